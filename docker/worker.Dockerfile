# syntax=docker/dockerfile:1
# Spark master and worker; with a GPU the same image encodes on it.
#
#   docker build -f docker/worker.Dockerfile -t marc-worker .        (from the root of the repository)
#
# BASE has to be Debian 12 with python3.11 and its venv module: driver and executors must run the same minor
# version of Python, and the driver is built on the same base. It needs no CUDA: the wheels of torch bring the
# CUDA libraries that they were built with, and the NVIDIA container toolkit mounts the driver and nvidia-smi.
# (nvidia/cuda images on Ubuntu 22.04 offer only a release candidate of 3.11, those on 24.04 only 3.12.)
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# torch with CUDA. For machines without a GPU: https://download.pytorch.org/whl/cpu
ARG TORCH_INDEX_URL=https://pypi.org/simple
ARG MAVEN_URL=https://repo1.maven.org/maven2

# Debian removes superseded versions from its mirrors: a pinned one would stop building within weeks.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends openjdk-17-jre-headless \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 50000 --create-home spark \
    && install -d -o spark -g spark /opt/marc /var/lib/spark

# The same path as in the driver's image: Spark starts the executors' Python by the driver's path.
RUN python3.11 -m venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} \
    PYSPARK_PYTHON=/opt/venv/bin/python \
    PYTHONUNBUFFERED=1

# Dependencies first, so that a change of the code does not install them again.
WORKDIR /opt/source
COPY pyproject.toml README.md LICENSE constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --index-url "${TORCH_INDEX_URL}" "$(grep '^torch==' constraints.txt)" \
    && pip install -c constraints.txt ".[reader,model,embedded,spark,vision]"

# Spark reads s3a:// with these jars. hadoop-aws must have the Hadoop version that pyspark bundles. The other two
# are the versions that it was built with (aws-java-sdk-v2.version and amazon-s3-analyticsaccelerator-s3.version of
# hadoop-project). ADD --checksum does not accept SHA-1, which is what Maven Central publishes beside the files.
ARG JARS=/opt/venv/lib/python3.11/site-packages/pyspark/jars
# The sources are URLs, which COPY does not take; hadolint does not see that through the variable.
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

# Executors unpickle functions of jobs/ by name, and the worker asks the script which GPUs it has.
WORKDIR /opt/marc
COPY jobs/ ./jobs/
COPY --chmod=755 docker/gpu-discovery.sh ./

# CUDA numbers GPUs by speed unless told to count as nvidia-smi does, whose numbers Spark hands to the tasks.
ENV PYTHONPATH=/opt/marc \
    CUDA_DEVICE_ORDER=PCI_BUS_ID \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    SPARK_WORKER_DIR=/var/lib/spark
USER 50000
EXPOSE 7077 8080 8081
CMD ["spark-class", "org.apache.spark.deploy.worker.Worker", "spark://spark-master:7077"]
