"""Text to token files to resumable batches. Imports no model.

Read in this order: `batch` (what a training step gets), `source` (what a corpus or a synthetic task must answer),
`corpus` and `recall` (two of them), `course` (which window of which source comes when), `loader` (windows to this
rank's batches); then `records` (what is read as a document), `texts` (where it comes from), `prepare` (text to a corpus
on disk).
"""
