"""The parsers are held to hand-written tables of what models write, and to properties."""

import json
import math
import re
import unicodedata
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_fd import problems
from mlx_fd.problems import parsing, prompts
from mlx_fd.problems.parsing import final_answer, parse_feedback
from mlx_fd.problems.prompts import Feedback
from mlx_fd.problems.thoughts import without_thoughts
from support.draws import draws

GOOD = "The second step adds 3 instead of taking it away, so the total is 4 too high."

# (what the model wrote, score, text); a text of None: not checked.
FEEDBACK = [
    # as asked
    (f"Score: 0.5\nFeedback: {GOOD}", 0.5, GOOD),
    (f"Score: -0.6\nFeedback: {GOOD}\n", -0.6, GOOD),
    (f"Score: +0.3\n\nFeedback:\n{GOOD}", 0.3, GOOD),
    (f"Score: 1\nFeedback: {GOOD}", 1.0, GOOD),
    (f"Score: 0\nFeedback: {GOOD}", 0.0, GOOD),
    (f"Score: -1\nFeedback: {GOOD}", -1.0, GOOD),
    (f"score: -0.5.\n{GOOD}", -0.5, GOOD),
    (f"SCORE:.7\nFEEDBACK: {GOOD}", 0.7, GOOD),
    (f"Score: -.7 Feedback: {GOOD}", -0.7, None),
    # other separators and labels
    ("score - .7", 0.7, "score - .7"),
    ("Score \u2013 0.7", 0.7, None),
    ("Score -0.7", -0.7, None),
    ("Score - -0.7", -0.7, None),
    ("Score = 0.25", 0.25, None),
    ("Score 0.4", 0.4, None),
    ("The score is 0.5.", 0.5, None),
    ("Overall score: 0.6", 0.6, None),
    ("Overall: 0.6", 0.6, None),
    ("Rating: 8 out of 10", 0.8, "Rating: 8 out of 10"),
    ("Grade: 7/10", 0.7, None),
    (f"Score:\n0.5\n\nFeedback:\n{GOOD}", 0.5, GOOD),
    (f"Here is my feedback:\n\nScore: 0.5\nFeedback: {GOOD}", 0.5, GOOD),
    (f"Sure! Here is the score: 0.5\n\n{GOOD}", 0.5, None),
    ("Score (from -1 to 1): 0.35", 0.35, None),
    ("Score [-1, 1]: -0.35", -0.35, None),
    ("Score (out of 10): 8", 0.8, None),
    ("Score out of 10: 8", 0.8, None),
    ("Score (1-5): 4", 0.8, None),
    # markdown and markup
    (f"**Score:** 7/10\n**Feedback:** {GOOD}", 0.7, GOOD),
    (f"**Score**: -0.25\n\n**Feedback**: {GOOD}", -0.25, GOOD),
    (f"### Score: 0.5\n### Feedback: {GOOD}", 0.5, GOOD),
    (f"- Score: 0.5\n- Feedback: {GOOD}", 0.5, GOOD),
    (f"**Score: 0.8**\n\n{GOOD}", 0.8, GOOD),
    (f"* **Score:** `0.8`\n* **Feedback:** {GOOD}", 0.8, GOOD),
    ("| Score | 0.5 |", 0.5, None),
    (f"<score>0.5</score>\n<feedback>{GOOD}</feedback>", 0.5, GOOD),
    ("Score: $-0.5$", -0.5, None),
    (r"Score: \boxed{0.75}", 0.75, None),
    ("Score: [0.5]", 0.5, None),
    ("Score: <0.5>", 0.5, None),
    # scales
    ("Score: 85%", 0.85, "Score: 85%"),
    ("Score: 85 percent", 0.85, None),
    ("Score: 1.0/1.0", 1.0, None),
    ("Score: 7/10 (0.7)", 0.7, None),
    ("Score: 0.7 (7/10)", 0.7, None),
    ("Score: 9 / 10.", 0.9, None),
    ("Score: 4/5 stars", 0.8, None),
    ("Score: 90/100", 0.9, None),
    ("Score: 7.5/10", 0.75, None),
    ("Score: 8 points out of 10", 0.8, None),
    ("Score: 8 on a scale of 1 to 10", 0.8, None),
    ("Score: 0.5 (on a scale from -1 to 1)", 0.5, None),
    ("Score: -5/10", -0.5, None),
    # scripts
    ("Score: \u22120.7", -0.7, None),
    ("Score\uff1a\uff10\uff0e\uff15", 0.5, None),
    ("Score: \u0660\u066b\u0665", 0.5, None),
    ("Score: -\u0966.\u096b", -0.5, None),
    ("Score: \u200f0.5", 0.5, None),
    ("Score: 0,8", 0.8, None),
    ("Score: minus 0.5", -0.5, None),
    ("Score: good (0.8)", 0.8, None),
    # sentences, no label
    ("I'd give this a 0.8", 0.8, "I'd give this a 0.8"),
    (f"I would rate this answer 7 out of 10. {GOOD}", 0.7, None),
    (f"I\u2019d give it a score of -0.4 because the total is wrong. {GOOD}", -0.4, None),
    ("This answer deserves a score of 0.9.", 0.9, "This answer deserves a score of 0.9."),
    (f"1. Score: 0.5\n2. Feedback: {GOOD}", 0.5, GOOD),
    (f"Score: 0.5 points\n{GOOD}", 0.5, GOOD),
    (f"0.5\n{GOOD}", 0.5, GOOD),
    (f"-1.0\n\nFeedback: {GOOD}", -1.0, GOOD),
    (f"8/10\n{GOOD}", 0.8, GOOD),
    # score after the feedback
    (f"{GOOD}\nScore: 0.5", 0.5, GOOD),
    (f"Feedback: {GOOD}\n\nScore: -0.5", -0.5, GOOD),
    (f"{GOOD} Score: 0.25", 0.25, GOOD),
    # several
    (f"Score: 0.5\nFeedback: {GOOD}\n\nScore: 0.9\nFeedback: Once more.", 0.5, GOOD),
    ("Initial score: 0.2\nOn a second look it is right.\nFinal score: 0.9", 0.9, None),
    ("Step score: 1.0, step score: 0.0\nOverall score: 0.5", 0.5, None),
    ("Score: <number from -1 to 1>\nScore: 0.3", 0.3, None),
    ("I'd give this a 0.8\nScore: 0.6", 0.6, None),
    ("Score: 5\nScore: 0.5", 0.5, None),
    # JSON
    (json.dumps({"score": 0.5, "feedback": GOOD}), 0.5, GOOD),
    (f"```json\n{json.dumps({'score': -1, 'feedback': GOOD}, indent=2)}\n```", -1.0, GOOD),
    (json.dumps({"feedback": GOOD, "score": "7/10"}), 0.7, GOOD),
    (json.dumps({"overall_score": 0.25, "comments": GOOD}), 0.25, GOOD),
    ('{"score": 0.5, "feedback": "The second step', 0.5, None),
    ("{'score': '0.5'}", 0.5, None),
    # thoughts
    (f"<think>Score: 0.1? No.</think>Score: 0.9\nFeedback: {GOOD}", 0.9, GOOD),
    (f"Score: 0.4\nFeedback: Step 2.</think>\n\n{GOOD}", None, GOOD),
    (f"Score: 0.4\nNo.</think>\n\nScore: 0.5\nFeedback: {GOOD}", 0.5, GOOD),
    ("<think>Score: 0.1", None, ""),
    ("[THINK]Score: 0.1[/THINK]Score: 0.2", 0.2, None),
    # out of range: not clamped
    ("Score: 5", None, "Score: 5"),
    ("Score: 85", None, None),
    ("Score: 150%", None, None),
    ("score 11/10", None, None),
    ("Score: -2", None, None),
    ("Score: 1.01", None, None),
    ("Score: 7/0", None, None),
    ("Score: 0/0", None, None),
    ("Score: 0 on a scale of 0", None, None),
    ("Score: 1,000", None, None),
    # templates, rubrics, ranges, calculations
    ("Score: [-1 to 1]", None, None),
    ("Score: [-1, 1]", None, None),
    ("Score: [0,1]", None, None),
    ("Score: -1 to 1", None, None),
    ("Score: -1..1", None, None),
    ("Score: <number from -1 to 1>", None, None),
    ("Score: 0.4-0.6", None, None),
    ("Score: between 0.5 and 0.7", None, None),
    ("Score: 1 excellent, 0.7 to 0.9 good, 0.4 to 0.6 fair", None, None),
    ("Score: -1, -0.5, 0, 0.5, 1", None, None),
    ("Score: 3 + 4 = 7", None, None),
    ("Score: 1st step is wrong", None, None),
    ("Score:\n\n1. The first step is right.\n2. The second is not.", None, None),
    ("Score-0.7", None, None),
    ("Score: 1. The first step is right.\n2. The second is not.", None, None),
    ("Score: 1. It is right.", 1.0, "It is right."),
    (prompts.feedback_prompt(), None, None),
    # numbers that belong to the mathematics, or none
    ("The answer 18 eggs is right.", None, "The answer 18 eggs is right."),
    ("3 + 4 = 7", None, "3 + 4 = 7"),
    ("She eats 3 of 16 eggs, 0.5 of them in the morning.", None, None),
    ("Tom's score: 85%, so the mean is 0.5", None, None),
    ("His score is 0.8 of hers.", None, None),
    ("Multiplying 0.5 by 2 gives 1.", None, None),
    ("In grade 1 there are 20 pupils.", None, None),
    ("8 out of 10 pupils passed, which is 0.8.", None, None),
    ("They score 1 goal in each game.", None, None),
    ("The average score: 0.5", None, None),
    ("1", None, None),
    ("18", None, None),
    ("1. The first step is right.", None, None),
    ("I give 0.5 dollars to each.", None, None),
    ("Overall: 1 egg is left.", None, None),
    ("Score: 1 2 3", None, None),
    ("Score: N/A\nFeedback: " + GOOD, None, GOOD),
    ("Score: zero point five", None, None),
    (GOOD, None, GOOD),
    ("", None, ""),
    ("\n \t", None, ""),
]


@pytest.mark.parametrize(("text", "score", "prose"), FEEDBACK)
def test_feedback_table(text, score, prose):
    found = parse_feedback(text, (1, 2))
    assert found.written_score == (None if score is None else pytest.approx(score, abs=1e-12))
    if prose is not None:
        assert found.text == prose
    assert found.text or not without_thoughts(text).strip()
    assert found.tokens == (1, 2)


@pytest.mark.parametrize("words", [3, 6, 9, 12])
def test_echoed_rubric_is_not_a_score_but_a_score_beside_it_is(words):
    rubric = prompts.feedback_prompt().splitlines()[1].partition(". The")[0]
    echo = " ".join(rubric.split()[:words])
    assert parse_feedback(f"Score: {echo}").written_score is None
    both = parse_feedback(f"{echo}\n\nScore: 0.4\nFeedback: {GOOD}")
    assert (both.written_score, both.text) == (0.4, GOOD)


ANSWERS = [
    # ####
    ("She sells 9 eggs at $2, so 9 * 2 = 18.\n#### 18", "18"),
    ("#### 18.", "18"),
    ("####18", "18"),
    ("####\n18", "18"),
    ("#### $18", "18"),
    ("#### -5", "-5"),
    ("#### - 5", "-5"),
    ("#### \u22125", "-5"),
    ("#### $-5", "-5"),
    ("#### -$5", "-5"),
    ("#### **18**", "18"),
    ("#### `18`", "18"),
    ("#### 18 eggs", "18"),
    ("#### 1,234 dollars", "1234"),
    ("#### 18 (9 * 2 = 18)", "18"),
    ("#### The final answer is 18", "18"),
    ("#### Answer: 18", "18"),
    ("#### x = 5", "5"),
    ("#### 48/2 = 24", "24"),
    ("#### 3 x 6 = 18 dollars", "18"),
    (r"#### \boxed{18}", "18"),
    ("#### 5\nNo, that is wrong.\n#### 7", "7"),
    ("\uff03\uff03\uff03\uff03 \uff11\uff18", "18"),
    ("##### 18", "18"),
    ("#### Step 1: add\n3 + 4 = 7\n#### Step 2: double\nThe answer is 14", "14"),
    ("#### 18\n\n#### Check\n2 eggs are left.", "18"),
    ("The answer is 42.\n#### ", "42"),
    # boxed
    (r"The answer is \boxed{18}. I used 3 steps.", "18"),
    (r"\boxed{\$18.50}", "37/2"),
    (r"\boxed{\frac{3}{4}}", "3/4"),
    (r"\boxed{-\dfrac{1}{2}}", "-1/2"),
    (r"\boxed{1\frac{1}{2}}", "3/2"),
    (r"\boxed{\frac34}", "3/4"),
    (r"\boxed{18 \text{ dollars}}", "18"),
    (r"\boxed{\text{Total: } 18}", "18"),
    (r"\boxed{x = 5}", "5"),
    (r"\boxed{9 \times 2 = 18}", "18"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{1{,}234}", "1234"),
    (r"\boxed{1\,234}", "1234"),
    (r"\boxed{\boxed{7}}", "7"),
    (r"\boxed{5} and then \boxed{6}, not 9", "6"),
    (r"\boxed{18", "18"),
    (r"\boxed 18", "18"),
    (r"\fbox{18} or 3", "18"),
    (r"\boxed{1.5 \times 10^{3}}", "1500"),
    (r"\boxed{\text{none}}, 3 left", "3"),
    # a heading, a reply that runs on, a unit's exponent, a note
    ("#### 1. Eggs left\n16 - 7 = 9\n\n#### 2. Money\n9 * 2 = 18\n\n$$\\boxed{18}$$", "18"),
    ("3+5=8\n#### 8\n\nQuestion: Ann has 2 pens and buys 1.\nAnswer: 2+1=3\n#### 3", "8"),
    (r"So \boxed{8}." "\n\n**Problem 2:** Ann has 2 pens.\n" r"\boxed{3}", "8"),
    ("Question: how many?\n3 + 5 = 8\n#### 8", "8"),
    ("#### 1,00,000", "100000"),
    # thousands with spaces, and several numbers
    ("#### 5 000", "5000"),
    ("#### -1 234 567", "-1234567"),
    ("#### $12 500.", "12500"),
    ("#### **12 500 dollars**", "12500"),
    ("#### 12 500 km/h", "12500"),
    ("#### 1 234.5", "2469/2"),
    ("#### 1 234,56", "30864/25"),
    ("#### 5 000 apples 12", "5000"),
    ("#### 5 000 apples in all, 12 a day", "5000"),
    ("#### 5 000 + 3 000 = 8 000", "8000"),
    ("#### 1 000/4", "250"),
    (r"\boxed{12 500}", "12500"),
    ("He pays 5 000 dollars.", "5000"),
    ("#### 12 500 apples in all", None),
    ("It costs 12 500 dollars.", "12500"),
    ("It costs 12\u202f500 dollars.", "12500"),
    ("It costs 12\u2009500 dollars.", "12500"),
    ("It costs 12\u00a0500 dollars.", "12500"),
    ("It costs 12'500 dollars.", "12500"),
    ("It costs 12\u2019500 dollars.", "12500"),
    ("It costs 12 500 dollars in all.", "12500"),
    ("So they need 12 500", "12500"),
    ("So the cost is **12 500** dollars.", "12500"),
    ("They drove -12 500.5 km (a year).", "-25001/2"),
    ("Es kostet 12 500,50 Euro.", "25001/2"),
    ("It costs $12 500 bills and all", "12500"),
    ("1 234 567 people of 12 500 came", "12500"),
    ("Of all 12 500 people came", None),
    ("It takes 3 250 ml bottles.", None),
    ("He paid with 12 100-dollar bills", "100"),
    ("It is 1 500/3 of it", "500/3"),
    ("Days 1 and 2 500", "2500"),
    ("It costs 12 5000 dollars", "5000"),
    ("It costs 12 50 dollars", "50"),
    ("It costs 1200 500 dollars", "500"),
    ("#### 3 250 ml bottles", None),
    ("#### 12 100-dollar bills", "12"),
    ("#### 5 12", "5"),
    ("#### 5 0000", "5"),
    ("#### 0 500", "0"),
    ("#### 3 000 4", "3"),
    ("#### 2 5 000", "2"),
    ("#### 1000 000", "1000"),
    ("In 2019 500 people came.", "500"),
    ("The total is 12,34,567 rupees.", "1234567"),
    ("The area is 20 m^2.", "20"),
    ("The area is 20 $cm^2$.", "20"),
    (r"The area is $20 \text{ m}^{2}$.", "20"),
    ("2^3 is 8, and 10^2 is 100", "100"),
    ("The answer is 12.\n\nNote: I assumed 7 days in a week.", "12"),
    ("The answer is 12.\n\n**Note:** I assumed 7 days in a week.", "12"),
    ("Note: there are 7 days.", "7"),
    ("\nNote: 3 + 4 = 7", "7"),
    # no number out of a formula
    (r"\boxed{\sqrt{51}}", None),
    (r"3 + 4 = 7, so it is $\sqrt{51}$.", None),
    (r"\boxed{\frac{\sqrt{3}}{3}}", None),
    (r"\boxed{\frac{5}{24r}}", None),
    (r"\boxed{7\pi}", None),
    (r"\boxed{(2,\infty)}", None),
    (r"\boxed{\{1,2\}}", None),
    (r"\boxed{1-i}", None),
    (r"\boxed{x^2+1}", None),
    (r"\boxed{240/(x-2)-240/x=10}", None),
    (r"\boxed{18 \pm 2}", None),
    (r"\boxed{10^2}", None),
    (r"\boxed{3 \times 6}", None),
    (r"\boxed{18 \text{ and } 20}", None),
    ("#### 2^{k}", None),
    ("#### (2,4)", None),
    ("#### y = -2x", None),
    ("#### n=-6,9", None),
    ("#### x=5, y=3", None),
    ("#### 2k", None),
    ("#### 18 or 20", None),
    ("#### 20-2", None),
    ("#### x > 5", None),
    ("The answer is 5x", None),
    (r"#### \frac{270}7", "270/7"),
    (r"\boxed{\frac9{19}}", "9/19"),
    (r"\boxed{45^\circ}", "45"),
    (r"\boxed{45^{\circ}}", "45"),
    ("#### 5^{th}", "5"),
    ("#### 5km", "5"),
    ("#### (1,234)", "1234"),
    ("#### 20 - 2 = 18", "18"),
    ("#### 18/day", "18"),
    ("#### 18 - a good price", "18"),
    ("#### 18 and a half", "18"),
    ("#### 18, which is 9 * 2", "18"),
    (r"#### 18 (since \sqrt{324} = 18)", "18"),
    ("#### <18>", "18"),
    ("The answer is <b>18</b>", "18"),
    (r"With \pi = 3.14 it is 28.26", "1413/50"),
    # magnitudes
    ("#### 1.5 million", "1500000"),
    ("#### 5 thousand dollars", "5000"),
    ("#### 2 hundred thousand", "200000"),
    # "How many dozens?" is a question, too.
    ("#### 3 dozen eggs", "3"),
    ("#### $2.5 Billion!", "2500000000"),
    ("#### 5\u00a0million", "5000000"),
    (r"\boxed{1.5\text{ million}}", "1500000"),
    ("It costs 1.5 million dollars.", "1500000"),
    ("#### 3 million-dollar homes", None),
    ("#### 5 hundred dollar bills", None),
    ("#### 2 thousand 5 hundred", None),
    ("It is 2 thousand 5 hundred.", None),
    ("#### 3 and a half million", None),
    ("#### 5 hundredths", None),
    ("#### 5 bn", None),
    ("#### 3 Mio.", None),
    ("#### 2 lakh", None),
    ("#### 3\u4e07", None),
    ("It costs 3\u4ebf", None),
    ("#### 5\u5343\u514b", "5"),
    ("#### 5 mL", "5"),
    # signs in words
    ("#### minus 5", "-5"),
    ("#### negative $5", "-5"),
    ("The answer is negative 5.", "-5"),
    ("He had 12 apples minus 5", "5"),
    ("#### 8 minus 5", None),
    # quantities of two parts, ratios and bounds
    ("#### 3:30", None),
    ("#### 3 : 4", None),
    ("#### 2 hours and 30 minutes", None),
    ("#### 2\u00a0hours 30 minutes", None),
    ("#### 5'4\"", None),
    ("#### 3 to 4", None),
    ("#### 3 remainder 2", None),
    ("#### 3 R 2", None),
    ("#### 5 apples and 6 pears", None),
    ("#### Tom: 5, Ann: 6", None),
    ("#### Tom = 5, Ann = 6", None),
    ("#### <5", None),
    ("#### >=5", None),
    ("#### \u2265 5", None),
    (r"#### \geq 5", None),
    ("#### 5 < x", None),
    ("#### 1 over 2", None),
    ("#### => 18", "18"),
    ("#### Total: $18, which is: 9 * 2", "18"),
    ("#### Answer: 5, check: 3 + 2 = 5", "5"),
    ("#### 18 dollars 9 x 2 = 18", "18"),
    ("#### 18 in 2 days", "18"),
    ("#### 18 eggs for 3 people", "18"),
    ("#### 5 apples (2 red and 3 green)", "5"),
    ("#### 3 m^2", "3"),
    ("#### 3 m\u00b2", "3"),
    ("#### 12 (6 * 2)", "12"),
    ("#### 18. She makes 18.", "18"),
    # formulas
    ("#### 2\u00b3", None),
    ("#### 2**3", None),
    ("#### 5!", None),
    ("It is 18!", "18"),
    ("#### |-3|", None),
    ("#### 12a", None),
    ("#### 12ab", None),
    ("#### 12*pi", None),
    ("#### 12 pi", None),
    ("#### 12 squared", None),
    (r"#### 0.\overline{3}", None),
    ("#### 0.(3)", None),
    (r"#### \frac{x}{2}", None),
    (r"#### \frac{\frac{1}{2}}{2}", None),
    (r"#### \frac{3}{-4}", "-3/4"),
    (r"#### \frac{-3}{-4}", "3/4"),
    (r"#### \frac{3+4}{2} = 3.5", "7/2"),
    (r"\boxed{\frac{\text{distance}}{\text{time}} = \frac{120}{2} = 60}", "60"),
    # decimal commas and dots between thousands
    ("#### 12,5", "25/2"),
    ("#### 0,125", "1/8"),
    ("#### 1.234.567", "1234567"),
    ("It is 1.234.567.", "1234567"),
    ("#### 1.2.3", None),
    # the last number
    ("Natalia sold 48+24 = <<48+24=72>>72 clips.", "72"),
    ("The answer is 18.", "18"),
    ("It costs $1,234.56 in all.", "30864/25"),
    ("It costs 1,234,567 dollars", "1234567"),
    ("It costs 18.00 dollars", "18"),
    ("about 12.5%", "25/2"),
    ("50%", "50"),
    ("3/4 of it", "3/4"),
    ("1 1/2 cups", "3/2"),
    ("1\u00bd cups", "3/2"),
    ("1 \u00bd cups", "3/2"),
    ("#### 1\u00a0\u00bd cups", "3/2"),
    (r"#### \frac{1}{2}3", None),
    (r"#### \frac123", None),
    ("\u00be", "3/4"),
    ("-3", "-3"),
    ("10-5", "5"),
    ("it is (-5)", "-5"),
    ("**18**", "18"),
    ("= .5", "1/2"),
    ("1\u202f234", "1234"),
    ("1\u00a0234\u00a0567 people", "1234567"),
    ("1'234 francs", "1234"),
    ("12,50 \u20ac", "25/2"),
    ("1.234,50 \u20ac", "2469/2"),
    ("\u20b9500", "500"),
    ("1.2e3", "1200"),
    ("2 \u00d7 10^3", "2000"),
    ("5e-1", "1/2"),
    ("\u0661\u0668", "18"),
    ("\u0967\u096e", "18"),
    ("\u517118\u4e2a", "18"),
    ("5 km", "5"),
    ("6pm", "6"),
    ("an area of 10 m2", "10"),
    ("1,2345", "2345"),
    ("<think>It is 4.</think>It is 5.", "5"),
    ("<think>It is 72", None),
    ("<think>It is 4.</think>", None),
    ("[THINK]It is 5[/THINK]It is 4.", "4"),
    ("<|begin_of_thought|>5<|end_of_thought|><|begin_of_solution|>4<|end_of_solution|>", "4"),
    # under headings
    ("#### 1. Cost\n3*4=12\n#### 2. Total\n12+6=18\n\n**Answer: 18**", "18"),
    ("#### 1. Cost\n3*4=12\n#### 2. Total\n\nAnswer: $\\sqrt{18}$", None),
    ("#### 18\n\nAnswer: as above", "18"),
    ("#### 18\n\nThe answer is 2 times 9.", "18"),
    # in tags
    ("<think>3*4</think><answer>12</answer>", "12"),
    ("<answer>12</answer> (checked in 2 ways)", "12"),
    ("#### Step 1: 3*4\n<Answer>\n12 eggs\n</Answer>", "12"),
    ("<answer>12</answer>\nNo, it is 13.\n#### 13", "13"),
    ("<answer>12</answer>\n\nQuestion: 2 + 2?\n<answer>4</answer>", "12"),
    ("I write <answer>...</answer> as asked. It is 12.", "12"),
    ("<answer>twelve</answer> of 12", None),
    ("#### Rs. 500 for 3 people", "500"),
    ("<|channel>thought\nIt is 5<channel|>It is 4.", "4"),
    ("...18", "18"),
    # nothing
    ("", None),
    ("eighteen", None),
    ("####", None),
    ("5/0", None),
    ("1e99999999", None),
    ("7" * 61, None),
    ("\u00b2", None),
]


@pytest.mark.parametrize(("text", "expected"), ANSWERS)
def test_answer_table(text, expected):
    assert final_answer(text) == (None if expected is None else Fraction(expected))


def test_tables_are_as_large_as_promised():
    assert len(FEEDBACK) >= 60
    assert len(ANSWERS) >= 60


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1,234", 1234), ("$18.50", Fraction(37, 2)), ("3/4", Fraction(3, 4)), ("18 eggs", 18),
     (" -5 ", -5), ("50%", 50), ("1 1/2", Fraction(3, 2)), ("2.0", 2), ("", None), ("none", None),
     ("18 or 20", None), ("18\n20", None), ("5 " + "eggs " * 99 + "7", None),
     ("about to be 7 of 9", None), ("1.5 million", 1_500_000), ("12,5", Fraction(25, 2))],
)  # fmt: skip
def test_number_is_one_number(text, expected):
    assert parsing.number(text) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [("18 eggs", "18"), ("1.5 million", "1500000"), ("12,5", "25/2"),
     ("4 million dollars", "4000000"), ("0,75", "3/4"), ("0,125", "1/8"), ("12,5 kg", "25/2"),
     ("1.234,50", "2469/2"), ("1.234.567", "1234567"), ("1.234", "617/500"),
     ("1,234.5", "2469/2"), ("minus 5", "-5"), ("3 orders", "3"), ("2 toys", "2"),
     ("5 \u20ac", "5"), ("5\u20ac", "5"), ("12,50 \u20ac", "25/2"), ("\u00a5500", "500"),
     ("\u20b91,00,000", "100000"), ("-$5", "-5"), ("$-5", "-5"), (r"\$5", "5"), ("$18$", "18"),
     ("US$5", "5"), ("Rs. 500", "500"), ("CHF 12.50", "25/2"), ("$4.50/hour", "9/2"),
     ("500\u5143", "500"), ("18\u4e2a", "18"), ("500\u5186", "500"), ("3 \uc2dc\uac04", "3"),
     ("3\u5343\u514b", "3"), ("5kg", "5"), ("60km/h", "60"), ("12 m/s", "12"), ("5 m", "5"),
     ("7 m\u00b2", "7"), ("12 cm^2", "12"), (r"12\text{ cm}^2", "12"), (r"18\text{ cm}", "18"),
     (r"90^\circ", "90"), ("90\u00b0", "90"), ("20 \u00b0C", "20"), ("\u00bd", "1/2"),
     ("3\u00bd", "7/2"), (r"1\frac{1}{2}", "3/2"), (r"\dfrac12", "1/2"), (r"$\frac{3}{4}$", "3/4"),
     ("1{,}234", "1234"), ("1 234,5", "2469/2"), ("\uff11\uff12", "12"), (r"50\%", "50"),
     (r"3 \times 10^{8}", "300000000"), ("1.5 \u00d7 10^-1", "3/20"), ("5e-05", "1/20000")],
)  # fmt: skip
def test_golds_that_are_numbers(text, value):
    assert parsing.is_number(text) and parsing.number(text) == Fraction(value)


@pytest.mark.parametrize(
    "text",
    ["12 pi", "3 dozen", "4 squared", "7 factorial", "12 and a half", "3 to the fourth", "3 or so",
     "5 bn", "3 lakh", "3\u4e07", "5 Mio.", "5 hundred-dollar bills", "1,2,3", "(2,4)", "2k",
     "3:30", "5ab", "5 ab^2", "2xy", "{5}", r"\{5\}", "5 x", "5 x^2", "10^2", r"5\mathbf{i}",
     r"5\pi", "5m", "3\u5e74\u534a", "18\u591a\u4e2a", "18\u4ee5\u4e0a", "3\u5272",
     "5\u5206\u4e4b\u4e00", "5cosx", "5 + 3", "x=5", "2024-01-05", "5\u00b2", "5 apples 3"],
)  # fmt: skip
def test_golds_that_are_no_numbers(text):
    assert not parsing.is_number(text)


# ---------------------------------------------------------------------- lm-evaluation-harness

STRICT = r"#### (\-?[0-9\.\,]+)"
FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"


def restated_filter(text, name):
    """Task gsm8k version 3: a regex filter with group_select 0 or -1, fallback [invalid]."""
    found = re.findall(STRICT if name == "strict" else FLEXIBLE, text)
    if not found:
        return "[invalid]"
    chosen = found[0] if name == "strict" else next(g for g in found[-1] if g)
    return chosen.strip()


def restated_match(text, gold, name):
    """exact_match with regexes_to_ignore, in the task's order, and ignore_case."""
    sides = []
    for side in (restated_filter(text, name), gold):
        for pattern in (",", "\\$", "(?s).*#### ", "\\.$"):
            side = re.sub(pattern, "", side)  # noqa: PLW2901
        sides.append(side.lower())
    return sides[0] == sides[1]


WRITTEN = st.text(st.sampled_from("0123456789.,$-# \nab%"), max_size=40)


@settings(max_examples=draws(1500), deadline=None)
@given(WRITTEN, WRITTEN)
@example("#### 18.", "so\n#### 18")
@example("#### 1,234\n#### 5", "#### 1234")
@example("#### 18.00", "#### 18")
@example("$18.", "#### 18")
def test_lm_eval_as_restated(text, gold):
    for name in ("strict", "flexible"):
        assert parsing.lm_eval_answer(text, name) == restated_filter(text, name)
        assert parsing.lm_eval_match(text, gold, name) == restated_match(text, gold, name)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### 18", "18", "18"),
        ("#### 1,234. Then 5 are left", "1,234.", "5"),
        ("####18", "[invalid]", "18"),
        ("#### $18", "[invalid]", "$18"),
        ("#### 5\n#### 7", "5", "7"),
        ("It is 7...", "[invalid]", "7..."),
        ("The end.", "[invalid]", "[invalid]"),
        ("Well... 5 then, ok..", "[invalid]", ".."),
        ("-5", "[invalid]", "-5"),
    ],
)
def test_lm_eval_by_hand(text, strict, flexible):
    assert parsing.lm_eval_answer(text, "strict") == strict
    assert parsing.lm_eval_answer(text, "flexible") == flexible


def test_lm_eval_compares_strings_and_final_answer_values():
    assert not parsing.lm_eval_match("#### 18.00", "#### 18", "strict")
    assert final_answer("#### 18.00", "strict") == 18
    assert final_answer("#### 1,234.", "strict") == 1234
    assert final_answer("so $18.", "flexible") == 18
    assert final_answer("#### 1.2.3", "strict") is None
    assert final_answer("ok..", "flexible") is None
    assert final_answer("#### " + "1" * 5000, "strict") is None
    with pytest.raises(ValueError, match="'strict' or 'flexible'"):
        final_answer("18", "stric")


def test_every_gsm8k_solution_is_read():
    for split, size in (("train", 7473), ("test", 1319)):
        rows = problems.load("gsm8k", split).problems
        assert len(rows) == size
        for row in rows:
            gold = Fraction(row.solution[row.solution.index("####") + 4 :].replace(",", ""))
            assert final_answer(row.solution) == gold and str(gold) == row.answer, row.id
            assert final_answer(row.solution, "strict") == gold, row.id
            assert parsing.lm_eval_match(row.solution, row.solution, "strict"), row.id


# -------------------------------------------------------------------------------- properties

PIECES = [
    "Score", "score:", "Rating", "Feedback:", "overall", "final ", "is", "of", "out of",
    "on a scale",
    "####", r"\boxed{", r"\frac{", "}", "{", "[", "]", "(", ")", '"', "'", "*", "**", "`", "|", "<",
    ">", "#", "$", "%", "/", "10", "100", "5", "0", "1", "-1", "0.5", ".", ",", "-", "\u2212", "+",
    "=", "~", "to", "I'd give", "this a", "we rate", "\n", "\n\n", " ", "\t", "\u202f", "\u00bd",
    "\u0661", "\u096b", "\uff15", "1e9", "e", "\u00d7 10^", "x", "eggs", "because", "</think>",
    "excellent", "good", "minus", "million", "dozen", "-", ":", "\\overline", "!", "\u00b2", "pi",
    "and", " hours", "0,1", "1.234", "\\text{", "\u0000", "\ud800", "\U0001d7d8",
]  # fmt: skip
MODEL_TEXT = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=14).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=14).map(" ".join),
    st.text(max_size=60),
)


def has_digit(text):
    return any(unicodedata.category(char) == "Nd" for char in text)


@settings(max_examples=draws(5_000), deadline=None)
@given(MODEL_TEXT)
def test_feedback_properties(text):
    found = parse_feedback(text)
    assert found.written_score is None or -1 <= found.written_score <= 1
    if not has_digit(text):
        assert found.written_score is None
    if without_thoughts(text).strip():
        assert found.text
    again = parse_feedback(prompts.format_feedback(found))
    if found.written_score is not None:
        assert again.written_score == pytest.approx(found.written_score, abs=5.1e-5)


@settings(max_examples=draws(5_000), deadline=None)
@given(MODEL_TEXT)
def test_answer_properties(text):
    found = final_answer(text)
    if found is None:
        assert not re.fullmatch(r"-?\d{1,50}", text, re.ASCII)
        return
    assert has_digit(text) or any(unicodedata.category(char) == "No" for char in text)
    assert final_answer(f"#### {found}") == found


SENTENCES = st.lists(
    st.sampled_from(
        [GOOD, "Redo step 2 as 12 - 3.", "The sum 3 + 4 = 7 holds.", "It is 8 out of 10 eggs.",
         "The layout is clear", "**Bold** words and `code`.", "Take 0.5 of 18, which is 9."]
    ),
    min_size=1, max_size=4,
).map(" ".join)  # fmt: skip


@settings(max_examples=draws(1000), deadline=None)
@given(st.floats(-1, 1) | st.sampled_from([-1.0, 0.0, 1.0, -0.00001]), SENTENCES)
def test_formatted_feedback_comes_back(score, text):
    written = prompts.format_feedback(Feedback(text, score))
    found = parse_feedback(written)
    assert found.written_score == pytest.approx(score, abs=5.1e-5)
    assert found.text == text
    assert prompts.format_feedback(found) == written
    assert not math.copysign(1, found.written_score) < 0 or found.written_score < 0


@settings(max_examples=draws(500), deadline=None)
@given(SENTENCES)
def test_feedback_without_a_score_comes_back(text):
    assert parse_feedback(prompts.format_feedback(Feedback(text, None))) == Feedback(text, None)


@settings(max_examples=draws(1000), deadline=None)
@given(st.integers(0, 10), st.sampled_from([10, 5, 100]))
def test_scales_are_ratios(value, scale):
    for written in (f"Score: {value}/{scale}", f"Rating: {value} out of {scale}."):
        expected = value / scale if value <= scale else None
        assert parse_feedback(written).written_score == expected


@settings(max_examples=draws(2000), deadline=None)
@given(st.integers(-(10**12), 10**12), st.integers(0, 4), st.sampled_from("#b "))
def test_numbers_come_back(digits, places, form):
    value = Fraction(digits, 10**places)
    written = f"{digits / 10**places:,.{places}f}" if abs(digits) < 10**14 else str(digits)
    value = Fraction(written.replace(",", ""))
    text = {"#": f"#### {written}", "b": rf"\boxed{{{written}}}", " ": f"It is {written} km."}[form]
    assert final_answer(text) == value
    for separator in " '\u00a0\u2009\u202f\u2019":
        assert final_answer(text.replace(",", separator)) == value


# ----------------------------------------------------------------------------------- prompts


def test_prompts_ask_for_what_is_parsed():
    assert prompts.answer_prompt(" How many? ").startswith("How many?")
    for prompt in (prompts.answer_prompt("q"), prompts.revise_prompt("f"), prompts.final_prompt()):
        assert prompt.endswith("#### <number>")
        assert final_answer(prompt) is None
    assert "a score from -1 to 1" in prompts.feedback_prompt()
    assert parse_feedback(f"{prompts.FEEDBACK_OPENING} 0.5\n{GOOD}").written_score == 0.5
    assert "70 words" in prompts.merge_prompt(Feedback("a", 0.1), Feedback("b", 0.2))
    assert "not rewrite" in prompts.critique_prompt()


def test_prompts_carry_their_arguments():
    merged = prompts.merge_prompt(Feedback("EXPERT SAYS", 0.1), Feedback("STUDENT SAYS", 0.2))
    assert merged.index("EXPERT SAYS") < merged.index("STUDENT SAYS")
    assert "FIX STEP 2" in prompts.revise_prompt(" FIX STEP 2\n")
    assert "feedback above" in prompts.revise_prompt("")


def test_prompts_stay_short():
    assert len(prompts.feedback_prompt().split()) < 160
    for prompt in (prompts.answer_prompt(""), prompts.revise_prompt(""), prompts.critique_prompt(),
                   prompts.final_prompt()):  # fmt: skip
        assert len(prompt.split()) < 40


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        (None, False),
        (Feedback("", 0.5), False),
        (Feedback("  \n", None), False),
        (parse_feedback("Score: 0.5"), False),
        (Feedback(GOOD, 0.5), False),
        (Feedback("Step 1 is wrong.", 0.5), True),
    ],
)
def test_needs_merge(student, expected):
    assert parsing.needs_merge(Feedback(GOOD, 0.1), student) is expected


def test_needs_merge_wants_an_expert_who_said_something():
    assert not parsing.needs_merge(parse_feedback("Score: 0.5"), Feedback(GOOD, 0.5))
