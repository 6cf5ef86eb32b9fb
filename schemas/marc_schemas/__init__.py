"""The contracts that stages, jobs and readers hand to one another: Arrow schemas and pydantic models."""
