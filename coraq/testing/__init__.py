"""For authors of methods: `assert_conforms` holds a method to the protocol; networks and oracles to test it on.

from coraq.testing import assert_conforms
from my_plugin import MyMethod

def test_my_method_conforms():
    assert_conforms(MyMethod)
"""

from coraq.testing.conformance import assert_conforms
from coraq.testing.networks import random_images, randomise_batchnorm, small_network
from coraq.testing.oracles import (
    hook_count,
    mean_output_error,
    plain_inputs,
    state_digest,
)

__all__ = [
    "assert_conforms",
    "hook_count",
    "mean_output_error",
    "plain_inputs",
    "random_images",
    "randomise_batchnorm",
    "small_network",
    "state_digest",
]
