"""Contracts between stages, jobs and readers: Arrow schemas and pydantic models."""
