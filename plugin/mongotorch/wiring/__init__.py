"""Where the rooms meet: publishing, loading, collections and training, each wired from its parts.

The rooms (`store`, `data`, `train`, `run`) do not know each other; every sentence that needs two of them is
here, below the datalayer, which only owns the resources and hands out these pieces.
"""
