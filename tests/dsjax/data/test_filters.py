"""Every reason to turn a text away, each with a text made for it; and that sound text is not turned away."""

import random
import re
import sysconfig
from pathlib import Path

import pytest

from dsjax.data.filters import filter_for

PROSE, CODE = filter_for("", "prose"), filter_for("", "code")
ROOT = Path(__file__).parents[3]

ENGLISH = """\
The ferry left the island at half past six, when the fog still lay on the water and the gulls had not begun to cry.
Only four passengers stood on deck: a teacher with a suitcase full of exercise books, two brothers who mended nets,
and an old woman who crossed every Thursday to sell honey on the market square. Nobody spoke. The engine knocked like
a tired clock, and behind them the lighthouse grew smaller until it was one pale stroke among many.

Halfway over, the captain slowed down and pointed to the north. A seal had followed the boat since the harbour mouth,
and now it lifted its head, looked at each of them in turn, and sank without leaving so much as a ring. The teacher
wrote this down. Years later she would read the page aloud in class and be asked whether seals can really count.
"""

FRENCH = """\
Le marché s'installait avant l'aube, à l'heure où les réverbères hésitaient encore à s'éteindre. Les maraîchers
déchargeaient leurs caisses, échangeaient des nouvelles de la vallée et se plaignaient, comme chaque année, de la
sécheresse. Près de la fontaine, une fillette vendait des œufs et du miel ; elle rendait la monnaie sans jamais lever
les yeux de son livre.

Vers midi, la chaleur chassa les derniers clients. On replia les bâches, on balaya les épluchures, et la place
retrouva son silence. Seul le boulanger, assis sur le seuil de sa boutique, regardait passer les chats en attendant
que la fournée du soir commence à dorer.
"""

GERMAN = """\
Als der Schnee endlich schmolz, kamen die Wege wieder zum Vorschein, grau und voller Löcher. Der Briefträger fluchte
über sein Fahrrad, die Kinder bauten Dämme in den Gräben, und auf den Höfen wurde das Brennholz für das nächste Jahr
gestapelt. Niemand hatte geglaubt, dass der Frühling so früh käme.

Großmutter öffnete alle Fenster und hängte die schweren Decken über das Geländer. Sie behauptete, man müsse den Winter
aus dem Haus lüften, sonst bleibe er bis zum Sommer in den Ecken sitzen. Wir lachten darüber, aber wir halfen ihr, und
am Abend roch das ganze Zimmer nach Gras und nassem Stein.
"""

RUSSIAN = """\
Поезд пришёл на станцию поздно вечером, когда в посёлке уже погасли почти все окна. На перроне никого не было, кроме
сторожа с фонарём и рыжей собаки, которая терпеливо ждала, пока кто-нибудь выйдет из вагона. Вышел один человек, в
длинном пальто, с ящиком инструментов, и сразу спросил, далеко ли до мельницы.

Сторож махнул рукой в сторону реки и предложил подождать до утра. Дорога там размыта, сказал он, и мост чинят второй
месяц. Приезжий подумал, поблагодарил и всё-таки пошёл пешком; собака немного постояла и побежала следом, будто давно
его знала.
"""

CHINESE = """\
清晨的集市还没有开张，卖豆腐的老人已经把木板擦得干干净净。他把热气腾腾的豆花盛进青花碗里，撒上葱末和虾皮，再浇一勺自家熬的酱油。
赶早班车的学生站在路边，一边吹气一边喝，书包上的铃铛叮当作响。

太阳升起以后，街上渐渐热闹起来。修鞋匠支起小摊，裁缝铺拉开了卷帘门，对面茶馆里传出收音机的声音。老人收好空桶，推着车慢慢往回走，
路过桥头时停下来，看了一会儿河里的船。今年的水比往年浅，船夫们都说，再不下雨，下游的稻田就要干裂了。
"""

JAPANESE = """\
駅前の古本屋は、雨の日だけ午後三時に店を開ける。店主の話によれば、晴れた日には誰も本など読まないからだという。
棚には地図や植物図鑑、とうに廃線になった鉄道の時刻表が並び、奥の机では三毛猫が眠っている。

先週の火曜日、一人の少年が濡れた傘を畳みながら入ってきて、星の名前が載っている本を探していると言った。店主はしばらく考え、
脚立に登って、いちばん上の段から薄い冊子を取り出した。表紙は色あせていたが、中の挿絵は驚くほど鮮やかだった。少年は代金を払い、
猫に軽く会釈をして、また雨の中へ出ていった。
"""

THAI = """\
หมู่บ้านเล็กๆริมแม่น้ำแห่งนี้มีที่ทำการไปรษณีย์เพียงแห่งเดียว ทุกเช้าบุรุษไปรษณีย์ขี่จักรยานข้ามเนินเขาไปส่งจดหมาย
ขากลับเขามักแวะซื้อเต้าหู้หรือหลอดไฟให้คุณยายที่ฝากมาเสมอ พอถึงฤดูฝนถนนก็ลื่นจนต้องเดินเท้า แต่เขาไม่เคยมาสายเลยสักครั้ง

วันหนึ่งมีซองจดหมายที่ตัวหนังสือบนหน้าซองเลือนหายไป เขามองลายมืออยู่นานแล้วเดาว่าเป็นของลูกสาวเจ้าของโรงสีฝั่งตรงข้าม
เมื่อเคาะประตู หญิงผมขาวคนหนึ่งออกมารับซองไปเงียบๆ แล้วยิ้มอยู่อย่างนั้นเนิ่นนาน
"""
KOREAN = """\
산 아래 작은 마을에는 우체국이 하나밖에 없었다. 우체부는 매일 아침 자전거를 타고 언덕을 넘어 편지를 날랐고,
돌아오는 길에는 할머니들의 부탁으로 두부나 전구를 사다 주기도 했다. 겨울이 오면 길이 얼어붙어 자전거 대신
걸어야 했지만 그는 한 번도 늦지 않았다.

어느 날 주소가 지워진 봉투가 도착했다. 우체부는 글씨체를 한참 들여다보다가 강 건너 방앗간 집 딸의 것이라고
짐작했다. 문을 두드리자 머리가 하얗게 센 여인이 나와 봉투를 받아 들고, 아무 말 없이 오래도록 웃었다.
"""

# As manuals are written: the same words come back in every step.
CHINESE_MANUAL = """\
第一步：打开设置窗口，选择网络选项，然后点击保存按钮。如果保存按钮是灰色的，请先关闭其他窗口。
第二步：打开设置窗口，选择显示选项，把字体大小改为十四，然后点击保存按钮，等待窗口自动关闭。
第三步：重新启动程序。程序启动以后，主窗口的左侧会出现文件列表，右侧会出现文件内容。
第四步：在文件列表中选择一个文件，点击鼠标右键，选择复制选项，再选择目标文件夹，然后点击确定按钮。
第五步：如果目标文件夹里已经有同名文件，程序会询问是否覆盖。点击确定按钮表示覆盖，点击取消按钮表示保留原来的文件。
第六步：全部文件复制完成以后，主窗口下方会显示复制完成。此时可以关闭程序，也可以继续选择其他文件。
第七步：如果要删除文件，先在文件列表中选择一个文件，然后点击删除按钮。程序会询问是否删除，点击确定按钮表示删除。
第八步：删除的文件会移动到回收站。打开回收站窗口，选择一个文件，点击还原按钮，文件就会回到原来的文件夹里。
第九步：使用结束以后，打开设置窗口，选择备份选项，输入备份文件夹的名称，然后点击保存按钮，等待备份完成。
"""

PYTHON = '''\
"""Reading thermometers that hang on a serial line."""

import struct


def temperatures(frames, *, offset=0.0):
    """Degrees of each frame, in the order in which the frames came."""
    for frame in frames:
        if len(frame) != 6:
            raise ValueError(f"a frame of {len(frame)} bytes")
        channel, raw = struct.unpack(">Hi", frame)
        yield channel, raw / 1000 + offset
'''


SLOGAN = "Share this story with your friends before the summer ends"


def words(count: int, per_line: int = 12) -> str:
    """Lines of invented words, no two lines alike."""
    rng = random.Random(count)
    syllables = ["ba", "ren", "tol", "mi", "sku", "den", "ora", "pli", "vess", "ga", "hum", "ti"]
    made = ["".join(rng.choices(syllables, k=rng.randint(2, 3))) for _ in range(count)]
    return "\n".join(" ".join(made[start : start + per_line]) for start in range(0, count, per_line)) + "\n"


def salted(phrase: str, share: float, times: int = 20) -> str:
    """Invented words with a phrase between them, whose repetitions have so large a share of the characters."""
    size = (times - 1) * len(phrase.replace(" ", "")) / share - times * (len(phrase) + 1)
    made = iter(words(1000).split())
    parts: list[str] = []
    for number in range(1, times + 1):
        parts.append(phrase)
        while sum(map(len, parts)) + len(parts) < number * (size / times + len(phrase) + 1):
            parts.append(next(made))
    return " ".join(parts)


def first_words(count: int) -> str:
    return " ".join(SLOGAN.split()[:count])


def moves(count: int) -> str:
    """Of a game of chess, as it is written down."""
    rng = random.Random(0)
    squares = [f"{column}{row}" for column in "abcdefgh" for row in range(1, 9)]
    return " ".join(
        f"{n}. {rng.choice(squares)} {rng.choice('NBRQK')}{rng.choice(squares)}" for n in range(1, count)
    )


# What Gopher's rules and C4's call it, and a text that they are for.
UNFIT_PROSE = [
    ("garbled", ENGLISH + "\x00\x01\x02\x03" * 4),
    ("garbled", ENGLISH.replace("the", "th\ufffd")),
    ("dup_para_frac", "\n\n".join(f"{line}\n\nBack to top" for line in words(240).splitlines())),
    ("dup_para_char_frac", "\n\n".join([*words(240).splitlines(), *[words(60, 60).strip()] * 10])),
    ("dup_line_frac", "\n".join(f"{line}\nAdd to basket" for line in words(240).splitlines())),
    ("dup_line_char_frac", words(60, 6) + words(60, 30) * 3),
    ("top_2_gram", salted("click here", 0.25)),
    ("top_3_gram", salted("subscribe for more", 0.19)),
    ("top_4_gram", salted("call us right now", 0.16)),
    ("duplicated_5_n_grams", salted(first_words(5), 0.152)),
    ("duplicated_6_n_grams", salted(first_words(6), 0.15)),
    ("duplicated_7_n_grams", salted(first_words(7), 0.14)),
    ("duplicated_8_n_grams", salted(first_words(8), 0.13)),
    ("duplicated_9_n_grams", salted(first_words(9), 0.12)),
    ("duplicated_10_n_grams", salted(first_words(10), 0.11)),
    ("gopher_short_doc", " ".join(ENGLISH.split()[:49])),
    ("gopher_long_doc", words(100_001)),
    ("gopher_below_avg_threshold", moves(80)),
    ("gopher_above_avg_threshold", "\n".join(f"https://example.org/{word}" for word in words(80).split())),
    ("gopher_too_many_hashes", words(240).replace(" ", " #", 60)),
    ("gopher_too_many_ellipsis", words(240).replace(" ", "... ", 60)),
    ("gopher_too_many_bullets", "\n".join(f"- {line}" for line in words(240).splitlines())),
    ("gopher_too_many_end_ellipsis", words(240).replace("\n", "...\n")),
    (
        "gopher_below_alpha_threshold",
        "\n".join(f"{word} {n * 37} {n * 91}" for n, word in enumerate(words(90).split())),
    ),
    (
        "boilerplate",
        ENGLISH + "\nThis site uses cookies.\nRead our privacy policy.\nAccept the terms of use.\n",
    ),
    ("boilerplate", ENGLISH + "\nLorem ipsum dolor sit amet, consectetur adipiscing elit.\n"),
]


@pytest.mark.parametrize(("reason", "text"), UNFIT_PROSE, ids=[reason for reason, _ in UNFIT_PROSE])
def test_prose_is_turned_away_for(reason, text):
    assert PROSE(text) == reason


@pytest.mark.parametrize(
    "text", [ENGLISH, FRENCH, GERMAN, RUSSIAN, CHINESE, JAPANESE, KOREAN, THAI, CHINESE_MANUAL]
)
def test_sound_prose_passes_in_any_script(text):
    assert PROSE(text) == ""


def test_text_that_mentions_what_others_are_turned_away_for_passes():
    assert PROSE(ENGLISH + "\nThe captain had no privacy policy, and nobody missed it.\n") == ""
    assert PROSE(words(240).replace(" ", "... ", 15)) == ""
    assert PROSE(words(100_000)) == ""


MINIFIED = "function a(b,c){return b.length>c?b.slice(0,c):b}var d=[];for(var e in window)d.push(a(e,9));"
ART = "".join(f"// {' ' * (30 - n)}{'/' * n}|{chr(92) * n}\n" for n in range(1, 30))
TABLE = "SINES = [\n" + "".join(f"    {n * n / 7:.6f}, {n * 31 / 9:.6f},\n" for n in range(40)) + "]\n"
CALM = "".join(
    f"value_{letter} = measured(device, channel={letter!r})\n" for letter in "abcdefghijklmnopqrst"
)
PASTED = "".join(
    f"button_{n} = Button(window)\nbutton.pack(side=LEFT)\nbutton.configure(width=9)\n" for n in range(30)
)

UNFIT_CODE = [
    ("garbled", PYTHON + "\x7fELF\x02\x01\x01" + "\x00" * 9),
    ("garbled", PYTHON.replace("e", "\ufffd", 9)),
    ("too short", "x = 1\n\n\n" + " " * 50),
    ("machine-written", f"// Code generated by protoc-gen-go. DO NOT EDIT.\n{PYTHON}"),
    ("machine-written", f"# This file was generated by setuptools_scm.\n{PYTHON}"),
    (
        "machine-written",
        f'""" Python Character Mapping Codec cp9 generated from CP9.TXT with gencodec.py."""\n{PYTHON}',
    ),
    ("machine-written", f"/*\n * Autogenerated by Thrift\n */\n{PYTHON}"),
    ("machine-written", f"#!/bin/sh\n# @generated\n{PYTHON}"),
    ("long lines", MINIFIED * 11),
    ("long lines", CALM + "# " + "x" * 999 + "\n"),
    ("long lines", "".join(f"# {number} {PYTHON[:90]!r}\n" for number in range(30))),
    ("too many digits", TABLE),
    ("too many symbols", ART),
    ("too many symbols", "".join(f"(ab>cd)||(!ef)&&{{{letter}gh}};\n" for letter in "ijklmnopq")),
    ("too many symbols", "".join(f"ab[1{n}]+=c*3{n};+\n" for n in range(10))),
    ("repeated lines", PASTED),
]


@pytest.mark.parametrize(("reason", "text"), UNFIT_CODE, ids=[reason for reason, _ in UNFIT_CODE])
def test_code_is_turned_away_for(reason, text):
    assert CODE(text) == reason


ORDINARY = [
    "Numbers are generated once and kept.",
    "Reads the profile generated by perf, and the report that was generated with it.",
    "Tests for a generator of generated names; see the generated documentation.",
    "The callers may edit and modify what they get.",
]


@pytest.mark.parametrize("comment", ORDINARY)
def test_ordinary_comments_make_no_machine(comment):
    assert CODE(f"# {comment}\n{PYTHON}") == ""


def test_a_little_of_what_others_are_turned_away_for_does_no_harm():
    assert CODE(PYTHON + "# a line that ends a page\x0c\n# and a bell\x07\n") == ""
    assert CODE(CALM + "# " + "x" * 998 + "\n") == ""
    assert CODE(PYTHON + TABLE[:200]) == CODE(PYTHON + PASTED[:300]) == CODE(PYTHON + ART[:300]) == ""


def test_programs_sign_at_the_top():
    assert CODE(PYTHON + "# What follows is generated code: do not edit.\n") == ""


def test_nearly_all_of_the_library_passes_as_code():
    root, others = (
        Path(sysconfig.get_path("stdlib")),
        {"site-packages", "dist-packages", "test", "tests", "idle_test"},
    )
    found = {
        path.relative_to(root): path.read_bytes().decode(errors="replace") for path in root.rglob("*.py")
    }
    library = {path.as_posix(): text for path, text in found.items() if others.isdisjoint(path.parts)}
    verdicts = {name: CODE(text) for name, text in library.items() if text.strip()}
    refused = {name: reason for name, reason in verdicts.items() if reason}
    assert len(verdicts) > 600
    assert len(refused) < 0.1 * len(verdicts)
    assert {"token.py", "keyword.py", "encodings/cp437.py", "pydoc_data/topics.py"} <= refused.keys()
    assert set(refused.values()) == {"machine-written"}


@pytest.mark.parametrize(
    ("rooms", "pattern", "kind", "least"), [("dsjax tests", "*.py", CODE, 100), ("docs", "*.md", PROSE, 5)]
)
def test_nearly_all_of_this_repository_passes(rooms, pattern, kind, least):
    """But for tables: of a page that is mostly figures, prose is what stands between them."""
    paths = [path for room in rooms.split() for path in (ROOT / room).rglob(pattern)]
    texts = {path: re.sub(r"(?m)^\|.*\n", "", path.read_text(encoding="utf-8")) for path in paths}
    texts = {path: text for path, text in texts.items() if text.strip()}
    assert len(texts) > least
    refused = {path: reason for path, text in texts.items() if (reason := kind(text))}
    assert len(refused) < 0.1 * len(texts), refused


def misread(text: str, encoding: str) -> str:
    """UTF-8 taken for another encoding, as browsers do it: bytes that it lacks are control characters."""
    return "".join(bytes([byte]).decode(encoding, "ignore") or chr(byte) for byte in text.encode())


def test_a_long_text_with_few_accents_that_was_misread_is_garbled():
    """A word in eighty, as in Italian manuals."""
    text = (ENGLISH + "Perché è così.\n") * 3
    assert PROSE(text) != "garbled"
    assert PROSE(misread(text, "cp1252")) == "garbled"


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize("text", [FRENCH, GERMAN, RUSSIAN, CHINESE, JAPANESE, KOREAN])
def test_text_that_was_misread_is_garbled(text, encoding):
    assert PROSE(misread(text, encoding)) == "garbled"
    commented = PYTHON + "".join(f"# {line}\n" for line in text.splitlines())
    assert CODE(commented) == ""
    assert CODE(misread(commented, encoding)) == "garbled"


SOUND = {
    "Czech": "Příliš žluťoučký kůň úpěl ďábelské ódy, když šťastný dědeček hledal svůj ztracený deštník.",
    "Polish": "Zażółć gęślą jaźń, rzekł święty Łukasz, i żółw pośpieszył ku źródłu przez gęstą mgłę.",
    "Spanish": "¿Qué pasó? ¡Nada! El niño pidió piñas, y la cigüeña comió más de lo que debía: «así es».",
    "Portuguese": "À noite, vovô Kowalsky vê o ímã cair no pé do pinguim queixoso e vovó põe açúcar no chá.",
    "Vietnamese": "Tiếng gà trưa vọng qua khu vườn, bà ngồi đan áo và kể chuyện thuở nhỏ cho các cháu nghe.",
    "Turkish": "Pijamalı hasta yağız şoföre çabucak güvendi; İstanbul'da güneş ışıl ışıl parlıyordu.",
    "Greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία· ο γέρος καθόταν στο λιμάνι και μετρούσε τα καΐκια.",
    "Hebrew": "דג סקרן שט בים מאוכזב ולפתע מצא לו חברה, והילדים צחקו על שפת הים עד שירד הערב.",
    "Arabic": "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر ومغلف بجلد أزرق، قالت الجدة.",
    "Hindi": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश करने वाले राम की कथा सुनो।",
    "signs": "“Quotes” – dashes — and ‘more’… cost 5 € or £4 at 20 °C ± 2 %, © 2024 Müller & Söhne™, §3.",
}


@pytest.mark.parametrize("text", SOUND.values(), ids=SOUND)
def test_accents_and_signs_are_not_garbled(text):
    assert CODE(text) == ""
    assert PROSE(text * 9) != "garbled"


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        *((suffix, PROSE) for suffix in ("", ".txt", ".MD", ".rst", ".tex", ".jsonl", ".parquet")),
        *((suffix, CODE) for suffix in (".py", ".c", ".JS", ".unheard-of")),
    ],
)
def test_the_ending_of_a_file_chooses_the_rules(suffix, kind):
    chosen = filter_for(suffix, "auto")
    for text in (PYTHON, MINIFIED * 11, ENGLISH, ENGLISH.replace("\n", " ")):
        assert chosen(text) == kind(text)
    assert PROSE(PYTHON) == "gopher_short_doc"
    assert CODE(ENGLISH.replace("\n", " ")) == "long lines"


def test_a_choice_of_rules_holds_for_any_ending():
    assert filter_for(".py", "prose")(PYTHON) == "gopher_short_doc"
    assert filter_for(".md", "code")(PYTHON) == ""
