"""The Datalayer: one open database, and everything a person does with it."""

from mongotorch.datalayer.datalayer import Datalayer

__all__ = ["Datalayer"]
