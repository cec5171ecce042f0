"""VSI-Bench-Debiased: the 2,362 questions of VSI-Bench that cannot be answered without looking. Scored as VSI-Bench.

files    test_debiased.parquet or test_debiased.jsonl, in the folder of VSI-Bench
videos   <dataset>/<scene>.mp4
"""

from benchmarks import vsibench

FILES = [["test_debiased.parquet"], ["test_debiased.jsonl"]]
FOLDER = "vsibench"

records = vsibench.records
check_row = vsibench.check_row
score_answer = vsibench.score_answer
extra_scores = vsibench.extra_scores
