"""Parameters of the DAGs, and their values in the running DAG."""

from typing import Any

from airflow.sdk import Param, get_current_context

CONFIG = Param(
    "",
    type="string",
    title="Configuration file",
    description="Path of marc.yaml on the workers. Default: the variable MARC_CONFIG, else ./marc.yaml there.",
)


def date_param(description: str, *, title: str = "Date") -> Param:
    """Return a parameter that is a date or empty."""
    return Param(None, type=["null", "string"], format="date", title=title, description=description)


def ds_param(purpose: str) -> Param:
    """Return the parameter ``ds``; ``purpose`` begins its description."""
    return date_param(f"{purpose}, YYYY-MM-DD. Default: the date of the run.")


def given_params(*names: str) -> dict[str, Any]:
    """Return some parameters of the running DAG, by name."""
    params: Any = get_current_context()["params"]
    return {name: params[name] for name in names}


def requested() -> dict[str, str]:
    """Return the date and the configuration file of the running DAG."""
    context = get_current_context()
    # A run without a logical date uses the date of its trigger.
    moment = context["dag_run"].logical_date or context["dag_run"].run_after
    given = given_params("ds", "config")
    return {"ds": str(given["ds"] or f"{moment:%Y-%m-%d}"), "config": given["config"]}
