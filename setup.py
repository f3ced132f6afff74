"""Builds the package; see pyproject.toml for the metadata."""

from setuptools import setup

if __name__ == "__main__":
    setup()
