"""Relevance labels from a language model (paper, Section 2.2).

Human labels fine-tune and judge a grader; the grader then labels pairs that no human saw.
"""

from embeddings.labeling.grades import LABELS, UNGRADED, Grader, Grades, Pairs

__all__ = ["LABELS", "UNGRADED", "Grader", "Grades", "Pairs"]
