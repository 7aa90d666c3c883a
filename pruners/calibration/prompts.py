"""Texts that are put before windows while a method learns what to prune."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from secateur.pruners.calibration.tokens import Prompts, tokenize

COLLABORATIVE = """###System Instruction:
Attention, LLM! You are undergoing optimization with a pruning algorithm to boost efficiency by removing redundant \
parameters. Here's what you need to know:
Improved Efficiency: The pruning algorithm streamlines your operations, enhancing overall performance.
Resource Utilization: Reducing unnecessary parameters optimizes computational resources and memory requirements.
Maintaining Quality: The algorithm selectively prunes to preserve language generation capabilities while minimizing \
impact on performance.
Iterative Refinement: Pruning occurs gradually, with fine-tuning after each step to ensure a smooth transition.
Collaboration: Embrace changes, continue generating high-quality language outputs to contribute to the optimization \
process.
Continuous Learning: Pruning helps you evolve, focusing on essential aspects of language generation.
Together, we'll create a leaner and more efficient version of you. Let's unlock your full potential through pruning.

Below is an User Instruction that describes a task, please take full consideration of the System Instruction mentioned \
above, and then write a response that appropriately completes the request.

###Input:
"""
"""Compresso's (Guo et al. 2023, arXiv 2310.05015), in the form that its released evaluation puts before texts.

The released training ends with the form of its instructions in place of the last line.
"""

PROMPTS = {"collaborative": COLLABORATIVE}
"""Texts by the names that recipes have for them."""


def prompt_tokens(tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Token ids of the prompts, without special tokens, by name."""
    return {name: tuple(tokenize(tokenizer, text).tolist()) for name, text in PROMPTS.items()}
