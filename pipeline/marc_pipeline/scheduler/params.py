"""Parameters of the DAGs, and what the running DAG was asked for."""

from typing import Any

from airflow.sdk import Param, get_current_context

CONFIG = Param(
    "",
    type="string",
    title="Configuration file",
    description="Path of marc.yaml on the workers; empty: the variable MARC_CONFIG, else marc.yaml where they run.",
)


def date_param(description: str, *, title: str = "Date") -> Param:
    """A date, or nothing."""
    return Param(None, type=["null", "string"], format="date", title=title, description=description)


def ds_param(what: str) -> Param:
    """The parameter ``ds``.

    Args:
        what: what the DAG does with the date.
    """
    return date_param(f"{what}, YYYY-MM-DD; empty: the date of the run.")


def given_params(*names: str) -> dict[str, Any]:
    """Some parameters of the running DAG, by name."""
    params: Any = get_current_context()["params"]
    return {name: params[name] for name in names}


def requested() -> dict[str, str]:
    """The date that the running DAG works on, and its configuration file."""
    context = get_current_context()
    # A run that was triggered without a logical date works on the day of the trigger.
    day = context["dag_run"].logical_date or context["dag_run"].run_after
    given = given_params("ds", "config")
    return {"ds": str(given["ds"] or f"{day:%Y-%m-%d}"), "config": given["config"]}
