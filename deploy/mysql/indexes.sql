-- The indexes that Sluice's queries use. Run it as often as you like: what is there already is left alone.
--
--   mariadb DATABASE < deploy/mysql/indexes.sql
--   mysql   DATABASE < deploy/mysql/indexes.sql
--
-- For another table than binance_liqs:
--
--   mariadb --init-command="SET @orders = 'other_table'" DATABASE < deploy/mysql/indexes.sql
--
-- MariaDB 10.2 or later, MySQL 5.7 or later. Needs the INDEX privilege (ALTER on some versions), which the user that
-- Sluice connects as does not need.
--
-- Both indexes are built online (ALGORITHM=INPLACE, LOCK=NONE): the table can be read and written meanwhile. At its
-- beginning and end the statement waits for open transactions on the table, and whoever comes after it waits with it: end
-- long transactions first. Building takes about 2 seconds a million rows and 40 to 90 bytes a row of disk, and its
-- changes are replicated: on a replica the same statement runs again and delays replication by as long. Where that hurts,
-- build it on the replicas first, or with pt-online-schema-change or gh-ost. If the server cannot build an index online, it
-- says so and changes nothing.
--
-- Sluice notices new indexes within a minute and logs which it uses. It works without them, by reading the whole table.

SET @orders = COALESCE(@orders, 'binance_liqs');

-- 1. liq_symbol_time (symbol, order_trade_time): finds the orders of a symbol, in order of time.
--    For: the newest orders, pages, streams, the list of symbols, and unknown symbols, which cost one probe.

SET @found = (
  SELECT COUNT(*) FROM (
    SELECT index_name FROM information_schema.statistics
    WHERE table_schema = DATABASE() AND table_name = @orders
    GROUP BY index_name
    HAVING LOWER(GROUP_CONCAT(column_name ORDER BY seq_in_index)) LIKE 'symbol,order\_trade\_time%' AND MAX(sub_part) IS NULL
  ) AS candidates
);
SET @statement = IF(@found > 0,
  'SELECT ''an index on (symbol, order_trade_time) is there already'' AS done',
  CONCAT('ALTER TABLE `', @orders, '` ADD INDEX `liq_symbol_time` (`symbol`, `order_trade_time`), ALGORITHM=INPLACE, LOCK=NONE'));
PREPARE statement FROM @statement;
EXECUTE statement;
DEALLOCATE PREPARE statement;

-- 2. liq_symbol_time_usd: holds all that /api/liquidations sums, so that no row of the table is read for it.
--    For: buckets over long spans, which it makes several times as fast. It can stand in for the first index too, at a
--    little more reading; leave the first away if writes or disk are dear. If the server says that the key is too long,
--    the text columns are very wide (VARCHAR(255) and more): do without it, or narrow them.

SET @found = (
  SELECT COUNT(*) FROM (
    SELECT index_name FROM information_schema.statistics
    WHERE table_schema = DATABASE() AND table_name = @orders
    GROUP BY index_name
    HAVING LOWER(GROUP_CONCAT(column_name ORDER BY seq_in_index)) LIKE 'symbol,order\_trade\_time,%' AND MAX(sub_part) IS NULL
       AND SUM(LOWER(column_name) IN ('side', 'average_price', 'order_filled_accumulated_quantity')) = 3
  ) AS candidates
);
SET @statement = IF(@found > 0,
  'SELECT ''an index that holds what sums need is there already'' AS done',
  CONCAT('ALTER TABLE `', @orders, '` ADD INDEX `liq_symbol_time_usd` (`symbol`, `order_trade_time`, `side`, `average_price`, ',
    '`order_filled_accumulated_quantity`), ALGORITHM=INPLACE, LOCK=NONE'));
PREPARE statement FROM @statement;
EXECUTE statement;
DEALLOCATE PREPARE statement;
