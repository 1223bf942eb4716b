"""Models on their way to others: what ``difffit export`` writes, one file a destination.

- :mod:`.pipeline`: a pipeline of diffusers
- :mod:`.hub`: a folder to publish, with a card
"""

from .hub import export_card
from .pipeline import export_pipeline

__all__ = ["export_card", "export_pipeline"]
