"""What the DAGs call: tasks, operators, parameters, retries and events. Only this package imports airflow."""
