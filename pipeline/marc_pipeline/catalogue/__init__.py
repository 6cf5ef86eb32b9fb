"""The item catalogue: find the day's files, read and validate rows, render texts."""
