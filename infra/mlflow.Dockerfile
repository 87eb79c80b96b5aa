# An MLflow server with users (basic auth), PostgreSQL and S3, in the version that the pipeline uses.
FROM python:3.11.14-slim-bookworm
COPY requirements.lock requirements-dev.lock /tmp/
# The locks have all of these except Flask-WTF, which only the server's basic auth needs.
RUN pip install --no-cache-dir --constraint /tmp/requirements.lock --constraint /tmp/requirements-dev.lock \
        "mlflow[auth]==3.17.2" "Flask-WTF==1.3.0" psycopg2-binary boto3 \
    && useradd --uid 1000 --create-home mlflow
ENV MLFLOW_DISABLE_TELEMETRY=true
USER mlflow
WORKDIR /home/mlflow
