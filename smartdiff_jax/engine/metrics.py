"""What the engine tells Prometheus; a registry of its own, so that two engines in a process do not meet."""

import time
from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from smartdiff_jax.engine.job import Job
from smartdiff_jax.engine.output import Report

SECONDS = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Names begin with smartdiff_; all but memory and the queue's bounds are labelled by model."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.jobs = self._of(Counter, "jobs", "Jobs by how they ended.", "model", "state")
        self.rejections = self._of(Counter, "rejections", "Requests turned away, by reason.", "reason")
        self.waiting = self._of(Gauge, "queue_jobs", "Jobs that wait.", "model")
        self.oldest = self._of(Gauge, "queue_oldest_seconds", "How long the oldest waiting job waits.", "model")
        self.backlog = self._of(Gauge, "queue_device_seconds", "Device time that is left to do, as estimated.")
        self.running = self._of(Gauge, "running_jobs", "Jobs this engine has begun.", "model")
        self.step = self._of(Histogram, "step_seconds", "A denoise step of one output.", "model", buckets=SECONDS)
        self.stage = self._of(Histogram, "stage_seconds", "A stage of one job.", "model", "stage", buckets=SECONDS)
        self.steps = self._of(Counter, "steps", "Denoise steps, computed or skipped by a cache.", "model", "kind")
        self.wait = self._of(Histogram, "wait_seconds", "From submission to the start.", "model", buckets=SECONDS)
        self.busy = self._of(Counter, "device_seconds", "Device time spent on jobs.", "model")
        self.checkpoints = self._of(Counter, "checkpoints", "Checkpoints, written or failed.", "model", "result")
        self.resumed = self._of(Counter, "resumed_jobs", "Jobs taken up from a checkpoint.", "model")
        self.refused = self._of(Gauge, "settings_refused", "1 while what lies in a file of settings cannot be taken.", "file")
        self.memory = self._of(Gauge, "device_bytes", "Device memory, by kind: in use, peak, limit.", "kind")

    def _of(self, kind, name: str, text: str, *labels: str, **options):
        return kind(f"smartdiff_{name}", text, labels, registry=self.registry, **options)

    def tell_queue(self, models: Collection[str], waiting: Collection[Job], running: Collection[Job], backlog: float) -> None:
        """How it stands with the queue now."""
        self.backlog.set(backlog)
        for model in models:
            of_model = [job.created_at for job in waiting if job.model == model]
            self.waiting.labels(model).set(len(of_model))
            self.oldest.labels(model).set(max(time.time() - min(of_model), 0.0) if of_model else 0.0)
            self.running.labels(model).set(sum(job.model == model for job in running))

    def tell_result(self, model: str, report: Report) -> None:
        """What a job's stages took on the device, and which steps were computed."""
        for stage, seconds in report.seconds.items():
            if stage != "text":  # which was told when it was encoded
                self.stage.labels(model, stage).observe(seconds)
        for letter in "".join(report.steps):
            self.steps.labels(model, "skipped" if letter == "." else "computed").inc()

    def exposition(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
