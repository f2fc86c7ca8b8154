"""The SQL of `experiments.datasets.complete_journey`.

The build goes through the weeks in order. What a week's features count was added to the tables
``product_weeks`` and ``query_weeks`` by the weeks before it, so that no feature can see its own
week or a later one.

Tables of the whole build: ``queries`` and ``texts`` (made in Python), ``items`` (products with
category and query), ``lines`` (transactions in local time), ``baskets`` (with what the household
did before), ``promotions``, ``matches`` (words that a query shares with a title).
Tables of one week: ``promoted`` (products on display or in the mailer of a store), ``asked``
(basket, query, category), ``requests``, ``repeats`` (what a household bought before), ``offered``
(request, candidate).
"""

CANDIDATES = 24
WINDOW_WEEKS = 8
HOUSEHOLD_DAYS = 84
HOUSEHOLD_WEEKS = HOUSEHOLD_DAYS // 7

# Eastern time by rule, because DuckDB's time-zone tables are an extension that has to be fetched:
# daylight saving time ran from 2017-03-12 07:00 to 2017-11-05 06:00 UTC, and the data is of 2017.
_LOCAL_TIME = """
    transaction_timestamp::TIMESTAMP - CASE
        WHEN transaction_timestamp >= TIMESTAMP '2017-03-12 07:00:00'
         AND transaction_timestamp < TIMESTAMP '2017-11-05 06:00:00'
        THEN INTERVAL 4 HOURS ELSE INTERVAL 5 HOURS END
"""

ITEMS = """
CREATE TABLE items AS
SELECT p.product_id, p.manufacturer_id AS manufacturer, p.brand, p.department,
       p.product_category AS category, p.product_type AS type,
       t.query_id, t.title, t.title_tokens
FROM products p JOIN texts t USING (product_id)
"""

LINES = f"""
CREATE TABLE lines AS
SELECT t.household_id AS user_id, t.store_id, t.basket_id, t.product_id,
       {_LOCAL_TIME} AS paid_at, t.week::INTEGER AS week, t.quantity,
       round(t.sales_value * 100)::BIGINT AS cents,
       round((t.retail_disc + t.coupon_disc + t.coupon_match_disc) * 100)::BIGINT AS discount_cents,
       i.query_id, i.category, i.type
FROM transactions t LEFT JOIN items i USING (product_id)
ORDER BY week, basket_id, product_id
"""

# A product that is listed twice for a store and week keeps the larger code of each place.
PROMOTIONS = """
CREATE TABLE promotions AS
SELECT product_id, store_id, week::INTEGER AS week, display_location, mailer_location
FROM promotions_file
WHERE store_id IN (SELECT store_id FROM lines)
"""

# Sums of whole cents are exact in any order; the frame ends a microsecond before the basket.
BASKETS = f"""
CREATE TABLE baskets AS
WITH totals AS (
    SELECT basket_id, any_value(user_id) AS user_id, any_value(paid_at) AS paid_at,
           sum(cents) AS cents
    FROM lines GROUP BY basket_id
)
SELECT basket_id,
       count(*) OVER before AS household_baskets,
       coalesce(sum(cents) OVER before, 0) / 100 AS household_spend
FROM totals
WINDOW before AS (
    PARTITION BY user_id ORDER BY paid_at
    RANGE BETWEEN INTERVAL {HOUSEHOLD_DAYS} DAYS PRECEDING
              AND INTERVAL 1 MICROSECOND PRECEDING
)
"""

# Prices are summed in whole billionths, so that the threads' order never shows in a feature.
COUNTS = """
CREATE TABLE product_weeks (
    week INTEGER, product_id BIGINT, purchases BIGINT, clicks BIGINT,
    priced BIGINT, price_sum HUGEINT, shared BIGINT, share_sum HUGEINT
);
CREATE TABLE query_weeks (week INTEGER, query_id INTEGER, requests BIGINT, clicks BIGINT);
"""

MATCHES = """
CREATE TABLE matches AS
WITH wanted AS (
    SELECT DISTINCT query_id, category FROM items
    WHERE query_id IS NOT NULL AND category IS NOT NULL
), pairs AS (
    SELECT DISTINCT w.query_id, i.product_id, i.title_tokens
    FROM wanted w JOIN items i USING (category)
    WHERE i.product_id IN (SELECT product_id FROM promotions)
)
SELECT query_id, product_id,
       (len(list_intersect(q.tokens, title_tokens)) / len(q.tokens))::FLOAT AS title_match
FROM pairs JOIN queries q USING (query_id)
"""

PROMOTED = """
CREATE OR REPLACE TEMP TABLE promoted AS
SELECT p.store_id, p.product_id, any_value(i.category) AS category,
       max(p.display_location) AS display_location, max(p.mailer_location) AS mailer_location
FROM promotions p JOIN items i USING (product_id)
WHERE p.week = $week AND i.category IS NOT NULL
GROUP BY p.store_id, p.product_id
"""

ASKED = """
CREATE OR REPLACE TEMP TABLE asked AS
SELECT DISTINCT basket_id, query_id, category, store_id, user_id, paid_at
FROM lines SEMI JOIN promoted USING (store_id, category)
WHERE week = $week AND query_id IS NOT NULL
"""

REQUESTS = """
CREATE OR REPLACE TEMP TABLE requests AS
WITH counted AS (
    SELECT query_id, sum(requests) AS query_requests, sum(clicks) AS query_clicks
    FROM query_weeks WHERE week BETWEEN $week - $window AND $week - 1 GROUP BY query_id
), wanted AS (
    SELECT DISTINCT basket_id, query_id, store_id, user_id, paid_at FROM asked
)
SELECT $first + row_number() OVER (ORDER BY w.paid_at, w.basket_id, q.query_type) AS request_id,
       w.*, q.query, q.query_type, b.household_baskets, b.household_spend,
       coalesce(c.query_requests, 0) AS query_requests, coalesce(c.query_clicks, 0) AS query_clicks
FROM wanted w JOIN queries q USING (query_id) JOIN baskets b USING (basket_id)
LEFT JOIN counted c USING (query_id)
"""

# What the household bought before each moment of the week, by the rule of the purchase history. The
# bound on the week says nothing new: lines stand in the order of weeks, so most are skipped by it.
REPEATS = f"""
CREATE OR REPLACE TEMP TABLE repeats AS
WITH moments AS (SELECT DISTINCT user_id, paid_at FROM requests)
SELECT m.user_id, m.paid_at, l.product_id, any_value(l.type) AS type, count(*) AS lines
FROM moments m JOIN lines l
    ON l.user_id = m.user_id AND l.paid_at < m.paid_at
    AND l.paid_at >= m.paid_at - INTERVAL {HOUSEHOLD_DAYS} DAYS
WHERE l.week BETWEEN $week - {HOUSEHOLD_WEEKS} AND $week
GROUP BY m.user_id, m.paid_at, l.product_id
"""

# The choice never looks at what was bought: an MD5 of the three names, the same in any engine.
OFFERED = """
CREATE OR REPLACE TEMP TABLE offered AS
WITH chosen AS (
    SELECT r.request_id, min_by(
        p.product_id,
        md5(r.basket_id::VARCHAR || '|' || r.query_type || '|' || p.product_id::VARCHAR),
        $candidates) AS product_ids
    FROM asked a
    JOIN requests r USING (basket_id, query_id)
    JOIN promoted p ON p.store_id = a.store_id AND p.category = a.category
    GROUP BY r.request_id
)
SELECT request_id, unnest(product_ids) AS product_id FROM chosen
"""

IMPRESSIONS = """
WITH bought AS (
    SELECT DISTINCT basket_id, product_id FROM lines WHERE week = $week
), counted AS (
    SELECT product_id, sum(purchases) AS purchases, sum(clicks) AS clicks,
           (sum(price_sum) / nullif(sum(priced), 0) / 1e9)::FLOAT AS price,
           (sum(share_sum) / nullif(sum(shared), 0) / 1e9)::FLOAT AS discount
    FROM product_weeks WHERE week BETWEEN $week - $window AND $week - 1 GROUP BY product_id
), repeated_types AS (
    SELECT user_id, paid_at, type, sum(lines) AS lines
    FROM repeats GROUP BY user_id, paid_at, type
)
SELECT r.request_id, r.user_id, r.query, o.product_id, r.paid_at AS requested_at,
       (b.product_id IS NOT NULL) AS clicked,
       r.query_type, r.store_id AS store,
       hour(r.paid_at)::BIGINT AS hour, (isodow(r.paid_at) - 1)::BIGINT AS weekday,
       o.product_id AS product, i.manufacturer, i.brand, i.department, i.category, i.type,
       p.display_location, p.mailer_location,
       r.query_requests::INTEGER AS query_requests, r.query_clicks::INTEGER AS query_clicks,
       r.household_baskets::INTEGER AS household_baskets,
       r.household_spend::FLOAT AS household_spend,
       c.price, c.discount,
       coalesce(c.purchases, 0)::INTEGER AS product_purchases,
       coalesce(c.clicks, 0)::INTEGER AS product_clicks,
       m.title_match,
       coalesce(s.lines, 0)::INTEGER AS product_repeats,
       coalesce(t.lines, 0)::INTEGER AS type_repeats
FROM offered o
JOIN requests r USING (request_id)
JOIN items i USING (product_id)
JOIN promoted p ON p.store_id = r.store_id AND p.product_id = o.product_id
JOIN matches m ON m.query_id = r.query_id AND m.product_id = o.product_id
LEFT JOIN counted c ON c.product_id = o.product_id
LEFT JOIN bought b ON b.basket_id = r.basket_id AND b.product_id = o.product_id
LEFT JOIN repeats s
    ON s.user_id = r.user_id AND s.paid_at = r.paid_at AND s.product_id = o.product_id
LEFT JOIN repeated_types t
    ON t.user_id = r.user_id AND t.paid_at = r.paid_at AND t.type = i.type
ORDER BY r.request_id, o.product_id
"""

COUNT_PRODUCTS = """
INSERT INTO product_weeks
WITH sold AS (
    SELECT l.product_id, p.product_id AS promoted,
           round(l.cents * 1e7 / nullif(l.quantity, 0))::BIGINT AS price,
           round(l.discount_cents * 1e9
                 / CASE WHEN l.quantity > 0 THEN nullif(l.cents + l.discount_cents, 0) END)::BIGINT
               AS share
    FROM lines l LEFT JOIN promoted p USING (store_id, product_id)
    WHERE l.week = $week
)
SELECT $week, product_id, count(*), count(promoted),
       count(price), sum(price), count(share), sum(share)
FROM sold GROUP BY product_id
"""

# A query's clicks: what its requests could have been clicked for, before the cap of candidates.
COUNT_QUERIES = """
INSERT INTO query_weeks
WITH bought AS (
    SELECT l.basket_id, l.category, count(DISTINCT l.product_id) AS clicks
    FROM lines l SEMI JOIN promoted p USING (store_id, product_id)
    WHERE l.week = $week GROUP BY l.basket_id, l.category
)
SELECT $week, a.query_id, count(DISTINCT a.basket_id), coalesce(sum(b.clicks), 0)
FROM asked a LEFT JOIN bought b USING (basket_id, category)
GROUP BY a.query_id
"""

CATALOG = """
SELECT product_id, title, category AS aisle, NULL::BLOB AS image FROM items ORDER BY product_id
"""

PURCHASES = """
SELECT user_id, product_id, paid_at AS purchased_at FROM lines
ORDER BY purchased_at, user_id, basket_id, product_id
"""

# Graded by the catalog alone. Irrelevant products are drawn by position, twice as many as are kept.
RELEVANCE = """
WITH wanted AS (
    SELECT DISTINCT query_id, category FROM items
    WHERE query_id IS NOT NULL AND category IS NOT NULL
), same_type AS (
    SELECT query_id, product_id, 2 AS label FROM items WHERE query_id IS NOT NULL
), same_category AS (
    SELECT w.query_id, i.product_id, 1 AS label FROM wanted w JOIN items i USING (category)
    WHERE i.query_id IS DISTINCT FROM w.query_id
), numbered AS (
    SELECT product_id, category, query_id, row_number() OVER (ORDER BY product_id) - 1 AS position
    FROM items WHERE category IS NOT NULL
), drawn AS (
    SELECT DISTINCT q.query_id,
           (md5_number(q.query_type || '|' || k.range::VARCHAR)
            % (SELECT count(*)::UHUGEINT FROM numbered))::BIGINT AS position
    FROM queries q CROSS JOIN range(2 * $kept) k
), other_category AS (
    SELECT d.query_id, n.product_id, 0 AS label FROM drawn d JOIN numbered n USING (position)
    ANTI JOIN wanted w ON w.query_id = d.query_id AND w.category = n.category
    WHERE n.query_id IS DISTINCT FROM d.query_id
), graded AS (
    FROM same_type UNION ALL FROM same_category UNION ALL FROM other_category
)
SELECT q.query, g.product_id, g.label::TINYINT AS label, 'derived' AS source
FROM graded g JOIN queries q USING (query_id)
QUALIFY row_number() OVER (
    PARTITION BY g.query_id, g.label
    ORDER BY md5(q.query_type || '|' || g.product_id::VARCHAR), g.product_id) <= $kept
ORDER BY q.query_type, g.label DESC, g.product_id
"""
