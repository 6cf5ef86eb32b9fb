# syntax=docker/dockerfile:1
# Airflow: API server, scheduler and DAG processor, and the driver of every Spark job they submit.
#
#   docker build -f docker/airflow.Dockerfile -t marc-airflow .        (from the root of the repository)
#
# Jobs run in client mode, so this image contains the needs of a driver: Java, the jars for s3a, and all extras of
# the project. The extra "model" is one of them: training runs the model in the driver, and a driver imports the
# modules that its tasks run.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# The driver has no GPU: torch without the CUDA libraries saves several GB.
ARG TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG MAVEN_URL=https://repo1.maven.org/maven2

# Versions are not pinned, because Debian removes superseded versions from its mirrors.
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

# Dependencies come first, so that a change of the code does not reinstall them. Airflow
# needs psycopg2 and asyncpg for the sync and async sessions of its metadata in PostgreSQL.
WORKDIR /opt/source
COPY pyproject.toml README.md LICENSE constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --index-url "${TORCH_INDEX_URL}" "$(grep '^torch==' constraints.txt)" \
    && pip install -c constraints.txt ".[all]" psycopg2-binary==2.9.13 asyncpg==0.32.0

# Spark reads s3a:// with these jars. hadoop-aws must have the Hadoop version that pyspark bundles. The other two
# have the versions that hadoop-aws was built with (aws-java-sdk-v2.version and
# amazon-s3-analyticsaccelerator-s3.version of hadoop-project). Maven Central publishes SHA-1 checksums, which
# ADD --checksum does not accept.
ARG JARS=/opt/venv/lib/python3.11/site-packages/pyspark/jars
# COPY does not accept URLs; hadolint does not recognise a URL that begins with a variable.
# hadolint ignore=DL3020
ADD --chmod=644 ${MAVEN_URL}/org/apache/hadoop/hadoop-aws/3.5.0/hadoop-aws-3.5.0.jar \
    ${MAVEN_URL}/software/amazon/awssdk/bundle/2.35.4/bundle-2.35.4.jar \
    ${MAVEN_URL}/software/amazon/s3/analyticsaccelerator/analyticsaccelerator-s3/1.3.1/analyticsaccelerator-s3-1.3.1.jar \
    ${JARS}/
COPY docker/s3a-jars.sha1 ./docker/
RUN sha1sum --check --strict docker/s3a-jars.sha1 && test -e "${JARS}/hadoop-client-api-3.5.0.jar"

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
