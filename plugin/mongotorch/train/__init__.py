"""Batches to a trained model: what a model and a trainer are, how a step is taken, how tensors are stored.

Always: nothing here knows a database; batches come in, and what happened comes out.
"""
