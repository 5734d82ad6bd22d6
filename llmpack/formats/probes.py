"""Texts and conversations on which tokenizers and templates that differ at all are likely to differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

Message = Mapping[str, str]

TEXTS = (
    "",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\t",
    " \n \n",
    "Hello, world!",
    " leading space",
    "   three leading spaces",
    "trailing space ",
    "trailing newline\n",
    "double  space and   triple",
    "tab\tand\t\ttabs",
    "line\r\nends\r\nof Windows",
    "a\n\nb\n\n\nc \n d",
    "    def f(x):\n        return {'a': [1, 2.5], \"b\": x ** 2}  # note\n",
    "1 12 123 1234 12345 123456789",
    "  3   33    333 and 4  5",  # digits after runs of spaces: pre-tokenizers split them differently
    "3.14159 1,000,000 -5 +7 1e-5 0xFF 50%",
    "2024-01-31T23:59:59Z v1.2.3-rc1",
    "I'm you're he's we'll they'd I've 'tis o'clock",
    "I'M YOU'RE HE'S WE'LL THEY'D I'VE",
    "don’t ‘quote’ “double” — dash … ellipsis",
    "camelCase snake_case SCREAMING_CASE kebab-case HTTPServer2",
    "https://example.org/path?x=1&y=%20#frag user@example.com",
    "!!! ??? ... --- === ### $$$ ((())) [[]] {{}} <<>> ```",
    "naïve café Zürich Ærøskøbing Łódź İstanbul ß",
    "e\u0301 a\u030a o\u0308\u0304",  # combining marks
    "\u00a0no-break\u2003em\u200bzero\u202fnarrow\ufeffmark",
    "Привет, как дела? Ещё раз: ёлка.",
    "Γειά σου Κόσμε; ΑΒΓ άέή",
    "שלום עולם! مرحبا بالعالم؟ ١٢٣",
    "नमस्ते दुनिया १२३ ক্ষমা করুন தமிழ்",
    "สวัสดีชาวโลก ภาษาไทย",
    "你好，世界！我在苹果工作12345天。",
    "こんにちは世界。カタカナとひらがな、漢字ー",
    "안녕하세요 세계! 한국어 텍스트입니다.",
    "mixed 中文 and English，再 mix ひと lines\n换行",
    "🚀 ✅ 🦙🦙 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽 ☃️",
    "𝕌𝕟𝕚𝕔𝕠𝕕𝕖 𝟙𝟚𝟛 ① ½ ² ₃ Ⅳ ﬁ",
    "\x00\x01\x1b[0m\x7f control",
    "lone high bytes \u0080\u00ff and \ufffd",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "the the the the the the the the the the the the the the",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "SELECT * FROM t WHERE a<>'b' AND c>=10; -- done",
    "$$\\int_0^\\infty e^{-x^2}\\,dx = \\frac{\\sqrt{\\pi}}{2}$$",
    "<|not_a_token|> <s_> </ s> [INST ] <unk",
)

CONVERSATIONS: Sequence[Sequence[Message]] = (
    ({"role": "user", "content": "What is the capital of France?"},),
    (
        {"role": "system", "content": "You are terse.\nAnswer in one word."},
        {"role": "user", "content": "  Capital of Japan? "},
    ),
    (
        {"role": "user", "content": "Hi! 👋"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": "Write `print('x')`\n\nand 数字 3  33."},
        {"role": "assistant", "content": "```python\nprint('x')\n```\n"},
        {"role": "user", "content": "Thanks"},
    ),
)


def special_texts(tokens: Iterable[str]) -> list[str]:
    """Texts with special tokens in them: alone, between words, after spaces, twice, cut short."""
    found = []
    for token in tokens:
        found += [token, f"{token}text", f"a {token} b", f" {token}\n", f"{token}{token}", f"{token[:-1]} x"]
    return found
