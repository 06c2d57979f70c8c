"""Rows of tokens to the order of their groups and back."""

from moejax.kernels.permute.gather import Permutation as Permutation
from moejax.kernels.permute.gather import permute as permute
from moejax.kernels.permute.gather import sort_by_group as sort_by_group
from moejax.kernels.permute.gather import ungroup as ungroup
from moejax.kernels.permute.gather import unpermute as unpermute
