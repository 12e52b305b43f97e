"""A process of its own for sentencepiece: `python sentencepiece_ids.py FOLDER` trains a small
`FOLDER/spiece.model`, reads a JSON list of captions, and writes the ids that transformers gives
them, as JSON. Its C++ library ends the process that it is in if a check of it fails, and with the
libraries that a test runner has loaded by then, it once did.
"""

import json
import random
import sys

import sentencepiece
from transformers import SiglipTokenizer

WORDS = "a photo of the two red blue small cat dogs horse running over café ﬁsh naïve 犬 Ⅻ".split()

folder = sys.argv[1]
rng = random.Random(3)
lines = [" ".join(rng.choices(WORDS, k=8)) for _ in range(500)]
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_prefix=f"{folder}/spiece",
    vocab_size=120,
    model_type="unigram",
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    normalization_rule_name="nmt_nfkc",
    hard_vocab_limit=False,
    num_threads=1,
    minloglevel=1,
)
tokenizer = SiglipTokenizer(f"{folder}/spiece.model")
captions = json.load(sys.stdin)
ids = tokenizer(captions, padding="max_length", truncation=True, max_length=64)["input_ids"]
json.dump(ids, sys.stdout)
