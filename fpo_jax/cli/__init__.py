"""The programs of the `fpo` command.

train, plan, config, export, generate, label  one file each; `__main__` lists them and those of `eval/`
init                   a config for a user's own data
args, generate_args    what several programs take, and how a program ends
jsonl_job              a file of answers that is written line by line and can be resumed
openai_client, secret  asking a server, and the key that nobody sees
process                what a program sets before it imports anything
"""
