"""Files and words: what every program writes, and how it says something.

atomic_io    files and folders that are there whole or not at all
jsonl        the one reader and the one writer of JSON Lines
json_digest  the one digest of values
run_log      every log line of a run, with its time, in a file of bounded size
terminal     errors, results and logs, with nothing in them that a terminal would obey
"""
