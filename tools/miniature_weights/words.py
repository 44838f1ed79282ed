"""Words for people that the rendered captions lack: each becomes a token between those of `man` and `woman`.

The captions know two words for a person. Any other is spelt in letters that no caption ever taught: of two people called
`person` no picture showed two faces. A word's own token, whose embedding is that of a known word or the mean of both, needs
no training, and texts without such words have the embeddings they had.
"""

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import CLIPTokenizer

LIKE = {
    "person": ("man", "woman"),
    "human": ("man", "woman"),
    "adult": ("man", "woman"),
    "child": ("man", "woman"),
    "kid": ("man", "woman"),
    "boy": ("man",),
    "guy": ("man",),
    "gentleman": ("man",),
    "male": ("man",),
    "girl": ("woman",),
    "lady": ("woman",),
    "female": ("woman",),
}
"""Each word with the known words it stands for; nobody in the miniature has an age."""


@torch.no_grad()
def add_words(tokenizer: CLIPTokenizer, embedding: nn.Embedding) -> int:
    """Give a tokenizer a token for each word of LIKE, and the text model's token embedding its row; return the rows.

    Both are changed in place. A word that has its token already gets its row anew, so that doing it twice changes nothing.
    The model's configuration (`vocab_size`) is the caller's to change.
    """
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in LIKE])
    old = embedding.weight
    rows = torch.cat([old, old.new_zeros(len(tokenizer) - len(old), old.shape[1])])
    for word, known in LIKE.items():
        # In float32: a mean in half precision could overflow, and is rounded only once here.
        of_known = [old[tokenizer.convert_tokens_to_ids(f"{one}</w>")].float() for one in known]
        rows[tokenizer.convert_tokens_to_ids(word)] = torch.stack(of_known).mean(0).to(rows.dtype)
    embedding.weight = nn.Parameter(rows)
    embedding.num_embeddings = len(rows)
    return len(rows)
