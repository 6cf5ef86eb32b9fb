"""Tasks, operators, parameters, retries and events of the DAGs. The only package that imports airflow."""
