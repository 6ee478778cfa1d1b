"""How like two results are: metrics on the device, and folders of results compared pair by pair."""
