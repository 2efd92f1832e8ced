"""The recall task: whether a model trained through the whole recipe reads what is far apart, and when it cannot.

documents.py makes the data, runs.py trains on real ranks, sound or with a fault, report.py draws accuracy by distance.
"""
