"""Names of the columns that the contracts fix, in one place."""

# catalog.parquet
PRODUCT_ID = "product_id"
TITLE = "title"
AISLE = "aisle"
IMAGE = "image"

# relevance.parquet
QUERY = "query"
LABEL = "label"
SOURCE = "source"

# purchases.parquet
USER_ID = "user_id"
PURCHASED_AT = "purchased_at"

# impressions.parquet
REQUEST_ID = "request_id"
REQUESTED_AT = "requested_at"
CLICKED = "clicked"

# request records, besides the above
PURCHASE_HISTORY = "purchase_history"
PURCHASE_AGE_DAYS = "purchase_age_days"
WEIGHT = "weight"

# embedding tables
ID = "id"
EMBEDDING = "embedding"
CONTENT = "content"
