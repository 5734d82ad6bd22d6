"""To be imported before GPTQModel: makes torchvision importable beside a torch for CPUs.

The environments of loaders have no llmpack; the module that does it needs nothing but torch.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
from llmpack.torchvision_operators import declare_operators

declare_operators()
