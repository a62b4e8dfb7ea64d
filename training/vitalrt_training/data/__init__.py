"""Samples for training and evaluation: an image, a question, an answer and a chain of K reasoning steps."""
