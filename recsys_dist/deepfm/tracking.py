"""MLflow: a training's settings and the figures of its epochs, told as they come."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from recsys_dist.config import Config
from recsys_dist.errors import ConfigError
from recsys_dist.workspace import OpenRun, code_version

TAG = "recsys_dist.run_id"
NO_METRICS = ("step", "attempt", "resumed_from", "seconds_left", "best")
# Read when MLflow is imported: no report of use, no word of its own, and a server that is away costs seconds.
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_CONFIGURE_LOGGING": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


class Tracking:
    """The MLflow run of a deepfm run, the same one where the training is gone on with by another driver.

    What goes wrong with it is printed once, and the training goes on without it.

    Args:
        config: `mlflow` says where, if at all.
        run: whose training it is.

    Raises:
        ConfigError: the package is not there.
    """

    def __init__(self, config: Config, run: OpenRun) -> None:
        self.uri, self.client = config.mlflow.tracking_uri, None
        if self.uri is None:
            return
        if importlib.util.find_spec("mlflow") is None:
            raise ConfigError(
                f"mlflow.tracking_uri={self.uri} needs MLflow, which is not installed: "
                f"pip install mlflow-skinny 'sqlalchemy<2.1' alembic, or give --set mlflow.tracking_uri=null"
            )
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        with self._unharmed():
            from mlflow import MlflowClient
            from mlflow.entities import Param

            client = MlflowClient(tracking_uri=self.uri)
            found = client.get_experiment_by_name(config.mlflow.experiment)
            experiment = found.experiment_id if found else client.create_experiment(config.mlflow.experiment)
            runs = client.search_runs([experiment], f"tags.`{TAG}` = '{run.run_id}'", max_results=1)
            if not runs:
                inputs = {f"recsys_dist.{stage}": of.run_id for stage, of in run.inputs.items()}
                tags = {TAG: run.run_id, "recsys_dist.uri": run.uri, "recsys_dist.code": code_version()}
                runs = [client.create_run(experiment, tags=tags | inputs, run_name=run.run_id)]
                settings = {"seed": config.seed} | config.deepfm.model_dump(mode="json")
                params = [Param(name, str(value)) for name, value in settings.items()]
                client.log_batch(runs[0].info.run_id, params=params)
            self.client, self.run_id = client, runs[0].info.run_id

    def epoch(self, line: dict[str, Any]) -> None:
        """Tell the numbers of a line of the history; those of a refit, which measures nothing, as such."""
        with self._unharmed():
            if self.client:
                for name, value in line.items():
                    if isinstance(value, int | float) and name not in NO_METRICS:
                        key = ("" if "metric" in line else "refit ") + name.replace("@", " at ")
                        self.client.log_metric(self.run_id, key, value, step=line["step"])

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._unharmed():
            if self.client:
                self.client.set_terminated(self.run_id, "FAILED" if error else "FINISHED")

    @contextlib.contextmanager
    def _unharmed(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.client = None
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"  warning: MLflow at {self.uri} is told no more: {why}", flush=True)
