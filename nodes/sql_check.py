"""Which trees of json_serialize_sql a user may run: what is not on a list here is refused.

A list of what is forbidden would be shorter, and wrong with the next version of DuckDB. Trees that are small as text
and grow without bound when they are planned (aliases of aliases, stars of stars) are weighed and refused as well:
planning heeds no deadline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DEPTH_MAX = 120
"""Levels of the tree; a function, an operator or a bracket is two of them."""
WEIGHT_MAX = 20_000
RELATION_WEIGHT = 250
"""Joins of more than some 80 relations keep the optimizer busy for longer than any deadline."""
RELATION_COLUMNS = 16

VIEWS = ("kv", "oplog")
TABLE_FUNCTIONS = frozenset({"range", "generate_series", "unnest", "json_each", "json_tree"})

RELATION_KINDS = frozenset({"EMPTY", "EXPRESSION_LIST", "SUBQUERY"})
INNER_KINDS = _words(
    """
    SET_OPERATION_NODE CTE_NODE JOIN
    BETWEEN CASE CAST COLLATE COMPARISON CONJUNCTION CONSTANT LAMBDA LAMBDA_REF OPERATOR POSITIONAL_REFERENCE
    ORDER_MODIFIER LIMIT_MODIFIER LIMIT_PERCENT_MODIFIER DISTINCT_MODIFIER ORDER_DEFAULT ASCENDING DESCENDING
    """
)
"""Nodes that are harmless when what is below them is."""

TYPES = _words(
    """
    bigint bignum bit blob bool boolean bpchar bytea char date datetime dec decimal double enum float float4 float8
    hugeint int int1 int2 int4 int8 integer interval json list long map numeric real short smallint string struct text
    time timestamp timestamptz timestamp_ms timestamp_ns timestamp_s tinyint ubigint uhugeint uinteger usmallint
    utinyint uuid varchar
    """
) | {"double precision", "time with time zone", "timestamp with time zone"}
"""Arrays of a fixed size are left out: a few characters would name gigabytes."""

FUNCTIONS = _words(
    """
    != % & && * ** + - -> ->> / // < << <= <=> = <> > >= >> @> <@ ^ ^@ | || ~ ~~ ~~* ~~~ !~~ !~~* !~ __between
    like_escape ilike_escape not_like_escape not_ilike_escape
    abs acos acosh add asin asinh atan atan2 atanh bit_count cbrt ceil ceiling cos cosh cot degrees divide even exp
    factorial fdiv floor fmod gamma gcd greatest isfinite isinf isnan lcm least lgamma ln log log10 log2 mod multiply
    nextafter pi pow power radians random round round_even roundbankers sign signbit sin sinh sqrt subtract tan tanh
    trunc xor
    ascii base64 bin bit_length char_length character_length chr concat concat_ws contains decode encode ends_with
    format_bytes from_base64 from_binary from_hex hash hex instr lcase left length len lower ltrim md5 md5_number
    nfc_normalize octet_length ord overlay parse_filename parse_path position prefix regexp_escape regexp_extract
    regexp_extract_all regexp_full_match regexp_matches regexp_replace regexp_split_to_array replace reverse right rtrim
    sha1 sha256 split split_part starts_with str_split str_split_regex string_split string_split_regex string_to_array
    strip_accents strlen strpos substr substring suffix to_base to_base64 to_binary to_hex translate trim ucase unbin
    unhex unicode upper url_decode url_encode
    coalesce constant_or_null if ifnull nullif switch typeof error
    age century current_date current_localtime current_localtimestamp date_add date_diff date_part date_sub date_trunc
    datediff datepart datesub datetrunc day dayname dayofmonth dayofweek dayofyear days_in_month decade epoch epoch_ms
    epoch_ns epoch_us era get_current_time get_current_timestamp hour isodow isoyear julian last_day make_date make_time
    make_timestamp make_timestamp_ms make_timestamp_ns make_timestamptz microsecond millennium millisecond minute month
    monthname nanosecond now quarter second strftime strptime time_bucket timezone timezone_hour timezone_minute
    to_centuries to_days to_decades to_hours to_microseconds to_millennia to_milliseconds to_minutes to_months
    to_quarters to_seconds to_timestamp to_weeks to_years today transaction_timestamp try_strptime week weekday
    weekofyear year yearweek
    gen_random_uuid uuid uuidv4 uuidv7 uuid_extract_timestamp uuid_extract_version
    apply array_aggr array_aggregate array_append array_apply array_cat array_concat array_contains array_distinct
    array_extract array_filter array_has array_has_all array_has_any array_indexof array_intersect array_length
    array_position array_prepend array_reduce array_reverse array_reverse_sort array_select array_slice array_sort
    array_to_string array_transform array_unique array_where array_zip cardinality element_at filter flatten list_aggr
    list_aggregate list_append list_apply list_avg list_cat list_concat list_contains list_count list_distinct
    list_element list_extract list_filter list_first list_has list_has_all list_has_any list_indexof list_intersect
    list_last list_max list_median list_min list_mode list_pack list_position list_prepend list_product list_reduce
    list_reverse list_reverse_sort list_select list_slice list_sort list_string_agg list_sum list_transform list_unique
    list_value list_where list_zip map map_concat map_contains map_entries map_extract map_extract_value
    map_from_entries map_keys map_values reduce row struct_extract struct_insert struct_keys struct_pack struct_values
    union_extract union_tag union_value unnest
    array_to_json from_json from_json_strict json json_array json_array_length json_contains json_exists json_extract
    json_extract_path json_extract_path_text json_extract_string json_group_array json_group_object json_keys
    json_merge_patch json_object json_quote json_structure json_transform json_transform_strict json_type json_valid
    json_value row_to_json to_json
    any_value approx_count_distinct approx_quantile approx_top_k arbitrary arg_max arg_max_null arg_min arg_min_null
    argmax argmin array_agg avg bit_and bit_or bit_xor bool_and bool_or corr count count_if count_star countif covar_pop
    covar_samp entropy favg first fsum geomean geometric_mean group_concat histogram kurtosis last list listagg mad max
    max_by mean median min min_by mode product quantile quantile_cont quantile_disc regr_avgx regr_avgy regr_count
    regr_intercept regr_r2 regr_slope skewness stddev stddev_pop stddev_samp string_agg sum sumkahan var_pop var_samp
    variance
    cume_dist dense_rank fill first_value lag last_value lead nth_value ntile percent_rank rank rank_dense row_number
    """
)
"""Left out besides everything that looks outside: what makes much out of little (repeat, lpad, printf, list_resize, the
scalar range) and what takes the square of its input's size in one step (levenshtein and its kin)."""


class SqlRefused(Exception):
    """A query that has no rows. `code` is SQL_REFUSED (not allowed) or SQL_FAILED (allowed, but it did not work)."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def refused(message: str) -> SqlRefused:
    return SqlRefused("SQL_REFUSED", message)


def too_complex() -> SqlRefused:
    return refused("the query is too complex: use fewer joins, CTEs, aliases of aliases, nesting")


def check_tree(statement: Any) -> None:
    """Raises SqlRefused unless the statement may run."""
    _Check().visit(statement)


class _Size(NamedTuple):
    """What planning a node may amount to: expressions in all, and columns handed on; both from above."""

    weight: int = 0
    columns: int = 0


class _Check:
    """Walks a tree of json_serialize_sql: refuses what is not known, and weighs the rest.

    Names in scope stand for the size of what they name, so that a reference weighs as much as the planner's copy.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._ctes: dict[str, _Size] = {}
        self._aliases: dict[str, int] = {}
        self._columns = 0
        """Columns of the FROM clause, which a star stands for."""
        self._special: dict[str, Callable[[dict[str, Any]], _Size]] = {
            "SELECT_NODE": self._select_node,
            "RECURSIVE_CTE_NODE": self._recursive_cte_node,
            "BASE_TABLE": self._base_table,
            "TABLE_FUNCTION": self._table_function,
            "SHOW_REF": self._show_ref,
            "FUNCTION": self._function,
            "WINDOW": self._window,
            "TYPE": self._type,
            "COLUMN_REF": self._column_ref,
            "STAR": self._star,
            "PARAMETER": self._parameter,
        }

    def visit(self, node: Any) -> _Size:
        if isinstance(node, list):
            return self._sum(node)
        if not isinstance(node, dict):
            return _Size()
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise too_complex()
        kind = node.get("class") or node.get("type")
        size = self._known(kind, node) if isinstance(kind, str) else self._children(node)
        self._depth -= 1
        # Sums of sums double from step to step: past the limit nothing is worth adding.
        if size.weight > WEIGHT_MAX or size.columns > WEIGHT_MAX:
            raise too_complex()
        return size

    def _known(self, kind: str, node: dict[str, Any]) -> _Size:
        if special := self._special.get(kind):
            return special(node)
        if kind in RELATION_KINDS:
            return self._children(node, weight=RELATION_WEIGHT)
        if kind in INNER_KINDS:
            return self._children(node, weight=1)
        raise refused(f"{kind.lower().replace('_', ' ')} is not allowed in a query: leave it out")

    def _sum(self, nodes: Any, weight: int = 0, columns: int = 0) -> _Size:
        for node in nodes:
            size = self.visit(node)
            weight += size.weight
            columns += size.columns
        return _Size(weight, columns)

    def _children(self, node: dict[str, Any], weight: int = 0, columns: int = 0) -> _Size:
        outer = self._ctes
        self._ctes = dict(outer)
        added = self._add_ctes(node)
        size = self._sum((v for k, v in node.items() if k != "cte_map"), weight + added, columns)
        self._ctes = outer
        return size

    def _add_ctes(self, node: dict[str, Any]) -> int:
        """Bring the node's CTEs into scope, one after the other: none sees itself, or a later one."""
        weight = 0
        for entry in (node.get("cte_map") or {}).get("map", ()):
            size = self.visit(entry["value"])
            self._ctes[entry["key"].lower()] = size
            weight += size.weight
        return weight

    # ---- queries ----

    def _select_node(self, node: dict[str, Any]) -> _Size:
        outer = self._ctes, self._aliases, self._columns
        self._ctes, self._aliases = dict(self._ctes), dict(self._aliases)
        weight = self._add_ctes(node)
        source = self.visit(node.get("from_table"))
        self._columns = source.columns
        listed = [self._select_item(item) for item in node["select_list"]]
        seen = ("cte_map", "from_table", "select_list")
        rest = self._sum(v for k, v in node.items() if k not in seen)
        self._ctes, self._aliases, self._columns = outer
        weight += source.weight + rest.weight + sum(size.weight for size in listed)
        return _Size(weight, sum(size.columns for size in listed))

    def _select_item(self, item: dict[str, Any]) -> _Size:
        size = self.visit(item)
        if alias := item.get("alias"):
            self._aliases[alias.lower()] = size.weight
        return size

    def _recursive_cte_node(self, node: dict[str, Any]) -> _Size:
        outer = self._ctes
        first = self.visit(node["left"])
        # Only the recursive part sees the name; in the first part it would be the name of a table.
        self._ctes = {**outer, node["cte_name"].lower(): first}
        rest = self._children({k: v for k, v in node.items() if k != "left"})
        self._ctes = outer
        return _Size(first.weight + rest.weight, first.columns + rest.columns)

    # ---- relations ----

    def _base_table(self, node: dict[str, Any]) -> _Size:
        name = _plain_name(node, "table_name")
        known = self._ctes.get(name)
        if known is None and name not in VIEWS:
            raise refused(f"no relation {node['table_name']!r} to read: query kv or oplog")
        size = known or _Size(0, RELATION_COLUMNS)
        return self._children(node, size.weight + RELATION_WEIGHT, size.columns)

    def _table_function(self, node: dict[str, Any]) -> _Size:
        function = node["function"]
        name = _plain_name(function, "function_name")
        if name not in TABLE_FUNCTIONS:
            raise refused(f"table function {name!r} is not allowed: query kv or oplog")
        rest = {k: v for k, v in node.items() if k not in ("function", "type")}
        return self._sum(
            [rest, function.get("arguments"), function.get("children")],
            RELATION_WEIGHT,
            RELATION_COLUMNS,
        )

    def _show_ref(self, node: dict[str, Any]) -> _Size:
        if not node.get("query") or node.get("table_name"):
            raise refused("SHOW is not allowed: DESCRIBE kv tells its columns")
        return self._children(node, RELATION_WEIGHT, RELATION_COLUMNS)

    # ---- expressions ----

    def _function(self, node: dict[str, Any]) -> _Size:
        name = _plain_name(node, "function_name")
        if name not in FUNCTIONS:
            raise refused(f"function {name!r} is not allowed in a query: leave it out")
        return self._children(node, weight=1)

    def _window(self, node: dict[str, Any]) -> _Size:
        if node.get("distinct"):
            raise refused("DISTINCT in a window is not allowed: use a subquery with GROUP BY")
        return self._function(node)

    def _type(self, node: dict[str, Any]) -> _Size:
        name = _plain_name(node, "type_name")
        if name not in TYPES:
            raise refused(f"type {name!r} is not allowed in a query: cast to another one")
        return self._children(node, weight=1)

    def _column_ref(self, node: dict[str, Any]) -> _Size:
        copies = sum(self._aliases.get(str(name).lower(), 0) for name in node["column_names"])
        return _Size(1 + copies, 1)

    def _star(self, node: dict[str, Any]) -> _Size:
        return self._children(node, 1 + self._columns, self._columns)

    def _parameter(self, node: dict[str, Any]) -> _Size:
        raise refused("parameters are not allowed: write the values into the query")


def _plain_name(node: dict[str, Any], field: str) -> str:
    """The name, in lower case, of something that is named without catalog and schema."""
    path = (node.get("qualified_name") or {}).get("path", [])
    if len(path) > 1 or any(
        node.get(k) for k in ("catalog", "schema", "catalog_name", "schema_name")
    ):
        raise refused(f"{'.'.join(path)!r} names a catalog or schema: use the bare name")
    return str(node[field]).lower()
