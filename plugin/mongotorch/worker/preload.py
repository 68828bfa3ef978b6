"""Loads, once in the process that job processes are forked from, what each of them would load for seconds.

It opens nothing and starts no thread, so that forking is safe. Only `multiprocessing` imports this module, in that
process.
"""

from __future__ import annotations

import torch

from mongotorch.resources import die_with_parent

# The job processes have a copy of the pipe by whose end this process would notice that the supervisor is gone.
die_with_parent()
# The first optimizer of a process makes torch load its compiler.
torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
