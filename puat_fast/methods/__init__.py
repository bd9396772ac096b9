"""What an update is, for every training method."""

from puat_fast.methods.phase import Method, Phase, Report, Scalars
from puat_fast.methods.puat import Puat
from puat_fast.methods.regular import Regular

METHODS: dict[str, type[Puat] | type[Regular]] = {"puat": Puat, "regular": Regular}

__all__ = ["METHODS", "Method", "Phase", "Puat", "Regular", "Report", "Scalars"]
