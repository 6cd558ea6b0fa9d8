"""The tokenizer: class, chat template, training."""

from minids.tokenizer.chat import CHAT_TEMPLATE
from minids.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer
from minids.tokenizer.train import sample_texts, train_from_texts, train_tokenizer

__all__ = ["CHAT_TEMPLATE", "SPECIAL_TOKENS", "Tokenizer", "sample_texts", "train_from_texts", "train_tokenizer"]
