"""Published data sets, as they are downloaded, into one file of this project's samples."""
