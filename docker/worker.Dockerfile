# syntax=docker/dockerfile:1
# Spark master and worker, with or without GPUs.
#
#   docker build -f docker/worker.Dockerfile -t marc-worker .        (from the root of the repository)
#
# BASE must be Debian 12 with python3.11 and its venv module, as in the image of the driver: driver and executors
# need the same minor version of Python. BASE needs no CUDA: the wheels of torch contain the CUDA libraries, and the
# NVIDIA container toolkit mounts the driver and nvidia-smi. (nvidia/cuda images on Ubuntu 22.04 have only a release
# candidate of 3.11, and those on 24.04 only 3.12.)
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

# torch with CUDA. For machines without a GPU: https://download.pytorch.org/whl/cpu
ARG TORCH_INDEX_URL=https://pypi.org/simple
ARG MAVEN_URL=https://repo1.maven.org/maven2

# Versions are not pinned, because Debian removes superseded versions from its mirrors.
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

# Dependencies come first, so that a change of the code does not reinstall them.
WORKDIR /opt/source
COPY pyproject.toml README.md LICENSE constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --index-url "${TORCH_INDEX_URL}" "$(grep '^torch==' constraints.txt)" \
    && pip install -c constraints.txt ".[reader,model,embedded,spark,vision]"

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

# Executors unpickle functions of jobs/ by name. The script lists the GPUs of the worker.
WORKDIR /opt/marc
COPY jobs/ ./jobs/
COPY --chmod=755 docker/gpu-discovery.sh ./

# Spark gives tasks the GPU numbers of nvidia-smi; by default CUDA numbers GPUs by speed.
ENV PYTHONPATH=/opt/marc \
    CUDA_DEVICE_ORDER=PCI_BUS_ID \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    SPARK_WORKER_DIR=/var/lib/spark
USER 50000
EXPOSE 7077 8080 8081
CMD ["spark-class", "org.apache.spark.deploy.worker.Worker", "spark://spark-master:7077"]
