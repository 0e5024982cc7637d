"""Files of records: JSON in lines or an array, CSV, TSV and parquet, plain or packed with gzip."""
