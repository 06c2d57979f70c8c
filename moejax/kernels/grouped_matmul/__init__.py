"""Matrix product of rows sorted by group with their group's matrix."""

from moejax.kernels.grouped_matmul.api import explain as explain
from moejax.kernels.grouped_matmul.api import grouped_matmul as grouped_matmul
