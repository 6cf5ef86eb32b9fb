# syntax=docker/dockerfile:1
# Airflow: API server, scheduler and DAG processor, and the driver of every Spark job they submit.
#
#   docker build -f docker/airflow.Dockerfile -t marc-airflow .        (from the root of the repository)
#
# Jobs run in client mode, so this image holds what a driver needs: Java, the jars for s3a, and every extra of
# the project. "model" is among them although encoding happens on the workers: training runs its model in the
# driver, and a driver imports the modules that its tasks run.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# The driver has no GPU: torch without the CUDA libraries, which weigh several GB.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG MAVEN_URL=https://repo1.maven.org/maven2

# Debian removes superseded versions from its mirrors: a pinned one would stop building within weeks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends openjdk-17-jre-headless \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 50000 --create-home airflow \
    && install -d -o airflow -g airflow /opt/airflow /opt/airflow/logs /opt/marc

# The same path as on the workers: Spark starts the executors' Python by the driver's path.
RUN python3.11 -m venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} \
    PYSPARK_PYTHON=/opt/venv/bin/python \
    PYTHONUNBUFFERED=1

# Dependencies first, so that a change of the code does not install them again. psycopg2 and asyncpg are what
# Airflow needs for its metadata in PostgreSQL: one for its sync, one for its async sessions.
WORKDIR /opt/source
COPY pyproject.toml README.md LICENSE constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --index-url "${TORCH_INDEX_URL}" "$(grep '^torch==' constraints.txt)" \
    && pip install -c constraints.txt ".[all]" psycopg2-binary==2.9.13 asyncpg==0.32.0

COPY docker/fetch_s3a.py ./docker/
RUN python docker/fetch_s3a.py --repository "${MAVEN_URL}"

COPY schemas/ ./schemas/
COPY pipeline/ ./pipeline/
RUN pip install --no-cache-dir --no-deps .

WORKDIR /opt/marc
COPY jobs/ ./jobs/
COPY dags/ ./dags/
COPY marc.yaml ./

ENV AIRFLOW_HOME=/opt/airflow \
    AIRFLOW__CORE__DAGS_FOLDER=/opt/marc/dags \
    AIRFLOW__CORE__LOAD_EXAMPLES=false \
    MARC_CONFIG=/opt/marc/marc.yaml \
    PYTHONPATH=/opt/marc
USER 50000
EXPOSE 8080
CMD ["airflow", "version"]
