"""Which trivia questions of chatterbot-corpus are used, by topic and category, chosen by reading them.

Numbers are rows of trivia.yml. Left out: questions about deaths, drink or scandals, and rows
whose answer is wrong, doubtful or dated.
"""

from __future__ import annotations

TRIVIA = {
    ("nature", "animals"): (9, 20, 28, 36, 46, 64, 65, 68, 102, 110, 167, 168, 169, 177, 181, 248),
    ("nature", "space-physics"): (
        3, 4, 5, 6, 22, 37, 55, 75, 77, 85, 105, 125, 126, 141, 151, 159, 160, 175, 184, 185, 194,
        200, 240, 253,
    ),
    ("nature", "body"): (38, 40, 44, 61, 83, 154, 158, 190, 197, 201),
    ("nature", "earth"): (8, 41, 43, 50, 86, 87, 94, 140, 150, 157, 171, 196, 221, 238),
    ("nature", "food"): (
        26, 56, 57, 78, 91, 93, 117, 122, 127, 133, 136, 138, 174, 191, 198, 215, 224, 225, 249,
        251, 254,
    ),
    ("culture", "film-tv"): (
        34, 47, 76, 95, 139, 147, 155, 163, 164, 165, 186, 187, 192, 199, 203, 204, 208, 209, 211,
        212, 213, 217, 222, 228, 231,
    ),
    ("culture", "music"): (
        19, 21, 49, 63, 66, 74, 107, 145, 178, 179, 205, 219, 233, 234, 250, 255, 256,
    ),
    ("culture", "books-art"): (14, 23, 24, 32, 35, 73, 101, 113, 124, 214, 218, 247, 252),
    ("culture", "sport-games"): (
        12, 17, 51, 52, 53, 88, 89, 96, 100, 111, 120, 129, 161, 162, 189, 216, 243, 245,
    ),
    ("culture", "history"): (
        0, 2, 25, 39, 67, 72, 90, 99, 128, 131, 132, 137, 142, 144, 166, 176, 188, 195, 235,
        242, 257,
    ),
    ("culture", "geography"): (
        7, 16, 18, 27, 31, 42, 59, 60, 81, 82, 108, 148, 149, 172, 173, 182, 193, 202, 223, 226,
        227, 232, 237, 241, 244, 246,
    ),
    ("general", "everyday"): (
        11, 29, 30, 58, 79, 114, 116, 118, 121, 123, 130, 146, 206, 229, 259,
    ),
}  # fmt: skip

# The refusal preset's categories of harmless pairs and prompts.
TOPIC_OF_CATEGORY = {
    "science": "nature",
    "medical": "nature",
    "history-culture": "culture",
    "computing": "general",
    "debate": "general",
    "everyday": "general",
    "law": "general",
    "writing": "general",
}
