"""The fast paths, each a file with a plain twin that it is checked against on the first batch of every run."""

import torch
from torch.autograd import forward_ad


def differentiated_otherwise() -> bool:
    """Is somebody taking forward derivatives or transforming functions (torch.func)? Only plain operations
    know how.
    """
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None
