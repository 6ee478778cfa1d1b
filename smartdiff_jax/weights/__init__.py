"""How weights get in: a checkpoint folder, its tensors streamed to their place and sharding, and a store of the result.

hub.fetch | convert.convert -> folder.open_folder -> stream.load -> nnx.State
                                    store.WeightStore around load, random_init.random_state instead of it
"""
