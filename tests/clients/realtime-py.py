"""The newest `realtime` from PyPI: the promises of scenarios.mjs, told by this client's own calls."""

import asyncio
import os
import re
import sys
from datetime import datetime, timedelta, timezone
from uuid import uuid4

from realtime import AsyncRealtimeClient

PATIENCE = 20
RELAY = os.environ["RELAY_URL"]
PROXY = os.environ["PROXY_URL"]
ALICE = "aaaaaaaa-0000-4000-8000-000000000001"
BOB = "bbbbbbbb-0000-4000-8000-000000000002"
BOARD = {"event": "*", "schema": "public", "table": "board"}
NOTES = {"event": "*", "schema": "public", "table": "notes"}


async def order(line):
    """Tells the test to do something, and returns what it answers."""
    print(line, flush=True)
    answer = await asyncio.wait_for(asyncio.to_thread(sys.stdin.readline), PATIENCE)
    assert answer.startswith("DONE"), f"{line}: {answer}"
    return answer[len("DONE ") :].strip()


async def write(sql):
    await order("WRITE " + " ".join(sql.split()))


async def token(who, seconds=3600):
    return await order(f"TOKEN {who} {seconds}")


async def connect(url, key, access_token=None, params=None):
    client = AsyncRealtimeClient(f"{url}/realtime/v1", key, params=params or {})
    if access_token:
        await client.set_auth(access_token)
    return client


class Inbox(asyncio.Queue):
    """Messages in order of arrival, until the test consumes them."""

    async def next(self):
        return await asyncio.wait_for(self.get(), PATIENCE)

    async def take(self, count):
        return [await self.next() for _ in range(count)]


class Listening:
    """A channel with one binding, or with several by name; what it tells is in its inboxes."""

    def __init__(self, client, topic, bindings):
        self.channel = client.channel(topic)
        self.changes, self.statuses, self.systems = Inbox(), Inbox(), Inbox()
        for name, binding in ({"": bindings} if "event" in bindings else bindings).items():
            self.channel.on_postgres_changes(callback=self.put_as(name), **binding)
        self.channel.on_system(self.systems.put_nowait)

    def put_as(self, name):
        return lambda payload: self.changes.put_nowait((name, payload["data"]))

    async def subscribe(self):
        await self.channel.subscribe(lambda status, error: self.statuses.put_nowait((status.value, str(error))))
        return self

    async def reaches(self, wanted):
        while True:
            status, error = await self.statuses.next()
            if status == wanted:
                return error

    async def briefs(self, count):
        return [brief(*change) for change in await self.changes.take(count)]


def brief(name, data):
    row = data.get("record") or data["old_record"]
    return f"{name} {data['type'].value} {row['id']}".lstrip()


async def subscribed(client, topic, bindings):
    listening = await Listening(client, topic, bindings).subscribe()
    same(await listening.statuses.next(), ("SUBSCRIBED", "None"))
    same((await listening.systems.next()).message, "Subscribed to PostgreSQL")
    return listening


def same(got, expected):
    assert got == expected, f"{got!r} is not {expected!r}"


async def gets_rows_as_they_come_change_and_go():
    notes = await subscribed(await connect(RELAY, await token("anon"), await token("alice")), "notes", NOTES)
    await write(
        f"""insert into notes values (1, '{ALICE}', 'first', 3, true, 12.50, '{{a,"b c"}}', '{{"k": [1, null]}}',
        '2026-01-02 03:04:05.678901+00')"""
    )
    _, inserted = await notes.changes.next()
    row = {
        "id": 1,
        "owner": ALICE,
        "title": "first",
        "stars": 3,
        "done": True,
        "price": 12.5,
        "tags": ["a", "b c"],
        "details": {"k": [1, None]},
        "due": "2026-01-02T03:04:05.678901+00:00",
    }
    same((inserted["type"], inserted["schema"], inserted["table"]), ("INSERT", "public", "notes"))
    same((inserted["record"], inserted["errors"], "old_record" in inserted), (row, None, False))
    types = {column["name"]: column["type"] for column in inserted["columns"]}
    same((types["id"], types["tags"], types["due"]), ("int8", "_text", "timestamptz"))
    at = datetime.fromisoformat(inserted["commit_timestamp"])
    assert abs(datetime.now(timezone.utc) - at) < timedelta(minutes=1), at
    await write("update notes set title = 'second', price = null")
    _, updated = await notes.changes.next()
    same((updated["type"], updated["record"]), ("UPDATE", {**row, "title": "second", "price": None}))
    same(updated["old_record"], {"id": 1})
    await write("delete from notes")
    _, deleted = await notes.changes.next()
    same((deleted["type"], deleted["old_record"], "record" in deleted), ("DELETE", {"id": 1}, False))


async def gets_the_whole_old_row_where_replica_identity_is_full():
    board = await subscribed(await connect(RELAY, await token("anon")), "board", BOARD)
    await write("insert into board values (1, 7, 'a')")
    await write("update board set text = 'b'")
    await write("delete from board")
    _, (_, updated), (_, deleted) = await board.changes.take(3)
    old, new = {"id": 1, "list": 7, "text": "a"}, {"id": 1, "list": 7, "text": "b"}
    same((updated["old_record"], updated["record"], deleted["old_record"]), (old, new, new))


async def gets_by_each_binding_what_its_event_and_filter_say():
    def on(event, filter):
        return {**BOARD, "event": event, "filter": filter}

    board = await subscribed(
        await connect(RELAY, await token("anon")),
        "board",
        {
            "added": on("INSERT", "list=eq.7"),
            "changed": on("UPDATE", "list=eq.7"),
            "removed": on("DELETE", "list=eq.7"),
            "either": on("*", "text=in.(red,green)"),
            "large": on("*", "id=gt.10"),
            "other": on("*", "list=neq.7"),
        },
    )
    for sql, expected in [
        ("insert into board values (1, 7, 'blue')", ["added INSERT 1"]),
        ("insert into board values (2, 8, 'red')", ["either INSERT 2", "other INSERT 2"]),
        ("insert into board values (11, 8, 'blue')", ["large INSERT 11", "other INSERT 11"]),
        ("update board set text = 'green' where id = 1", ["changed UPDATE 1", "either UPDATE 1"]),
        ("update board set list = 7 where id = 2", ["changed UPDATE 2", "either UPDATE 2"]),
        ("delete from board where id = 1", ["either DELETE 1", "removed DELETE 1"]),
        ("update board set list = 9 where id = 11", ["large UPDATE 11", "other UPDATE 11"]),
        ("delete from board where id = 2", ["either DELETE 2", "removed DELETE 2"]),
    ]:
        await write(sql)
        same(sorted(await board.briefs(len(expected))), expected)


async def gets_rows_that_match_one_of_several_conditions():
    def on(condition):
        return {**BOARD, "event": "*", "filter": condition}

    board = await subscribed(
        await connect(RELAY, await token("anon")),
        "board",
        {
            "either": on('or=(list.eq.7,text.in.(red,"a, (b)"))'),
            "nested": on("id=lt.10,or=(and(list.gt.7,list.lt.9),not.or(text.neq.red,id.neq.1))"),
            "neither": on("not.or=(list.eq.7,text.like.%e%)"),
        },
    )
    for sql, expected in [
        ("insert into board values (1, 7, 'blue')", ["either INSERT 1"]),
        ("insert into board values (2, 8, 'a, (b)')", ["either INSERT 2", "neither INSERT 2", "nested INSERT 2"]),
        ("insert into board values (3, 9, 'x')", ["neither INSERT 3"]),
        ("update board set text = 'red', list = 9 where id = 1", ["either UPDATE 1", "nested UPDATE 1"]),
        ("delete from board where id = 2", ["either DELETE 2", "neither DELETE 2", "nested DELETE 2"]),
    ]:
        await write(sql)
        same(sorted(await board.briefs(len(expected))), expected)


async def shows_two_users_only_their_own_rows():
    key = await token("anon")
    alice = await subscribed(await connect(RELAY, key, await token("alice")), "notes", NOTES)
    bob = await subscribed(await connect(RELAY, key, await token("bob")), "notes", NOTES)
    await write(f"insert into notes (id, owner, title) values (1, '{ALICE}', 'a'), (2, '{BOB}', 'b')")
    await write("update notes set stars = 1")
    await write("delete from notes where id = 1")
    await write(f"insert into notes (id, owner, title) values (3, '{ALICE}', 'a')")
    await write(f"update notes set owner = '{BOB}' where id = 3")
    await write("insert into notes (id, title) values (9, 'for everybody')")
    same(await alice.briefs(5), ["INSERT 1", "UPDATE 1", "DELETE 1", "INSERT 3", "INSERT 9"])
    seen = await bob.changes.take(4)
    same([brief(*change) for change in seen], ["INSERT 2", "UPDATE 2", "UPDATE 3", "INSERT 9"])
    same(seen[2][1]["old_record"], {"id": 3})


async def sees_other_rows_once_another_token_is_set():
    client = await connect(RELAY, await token("anon"), await token("alice"))
    notes = await subscribed(client, "notes", NOTES)
    rows = "({n}1, '{a}', 'a'), ({n}2, '{b}', 'b'), ({n}9, null, 'for everybody')"
    await write("insert into notes (id, owner, title) values " + rows.format(n=1, a=ALICE, b=BOB))
    same(await notes.briefs(2), ["INSERT 11", "INSERT 19"])
    await client.set_auth(await token("bob"))
    same((await notes.systems.next()).status, "ok")
    await write("insert into notes (id, owner, title) values " + rows.format(n=2, a=ALICE, b=BOB))
    same(await notes.briefs(2), ["INSERT 22", "INSERT 29"])


async def is_let_in_by_a_token_that_comes_after_the_join():
    client = await connect(RELAY, await token("anon"))
    notes = await Listening(client, "notes", NOTES).subscribe()
    await notes.reaches("CHANNEL_ERROR")
    await client.set_auth(await token("alice"))
    # Left alone it would join the topic once more and take the close of its first join for that of the second.
    await client.remove_channel(notes.channel)
    notes = await subscribed(client, "notes", NOTES)
    await write(f"insert into notes (id, owner, title) values (1, '{ALICE}', 'a')")
    same(await notes.briefs(1), ["INSERT 1"])


async def keeps_the_rows_when_the_same_user_renews_the_token():
    client = await connect(RELAY, await token("anon"), await token("alice", 30))
    notes = await subscribed(client, "notes", NOTES)
    await client.set_auth(await token("alice", 3600))
    same((await notes.systems.next()).status, "ok")
    await write(f"insert into notes (id, owner, title) values (1, '{ALICE}', 'a')")
    same(await notes.briefs(1), ["INSERT 1"])


async def subscribes_with_an_opaque_key_alone():
    board = await subscribed(await connect(RELAY, "sb_publishable_for_tests"), "board", BOARD)
    await write("insert into board values (1, 7, 'a')")
    same(await board.briefs(1), ["INSERT 1"])
    notes = await subscribed(await connect(RELAY, "sb_secret_for_tests"), "notes", NOTES)
    await write(f"insert into notes (id, owner, title) values (1, '{ALICE}', 'a')")
    same(await notes.briefs(1), ["INSERT 1"])


async def both_arrive(board, notes):
    await write("insert into board values (1, 7, 'a')")
    await write(f"insert into notes (id, owner, title) values (1, '{BOB}', 'b'), (2, '{ALICE}', 'a')")
    same((await board.briefs(1), await notes.briefs(1)), (["INSERT 1"], ["INSERT 2"]))


async def gets_changes_again_after_its_socket_was_cut():
    client = await connect(PROXY, await token("anon"), await token("alice"))
    both = [await subscribed(client, "board", BOARD), await subscribed(client, "notes", NOTES)]
    await order("CUT")
    for listening in both:
        await listening.reaches("CHANNEL_ERROR")
        await listening.reaches("SUBSCRIBED")
    await both_arrive(*both)


async def gets_changes_again_after_the_relay_was_restarted():
    client = await connect(RELAY, await token("anon"), await token("alice"))
    both = [await subscribed(client, "board", BOARD), await subscribed(client, "notes", NOTES)]
    await order("STOP")
    for listening in both:
        await listening.reaches("CHANNEL_ERROR")
    await order("START")
    for listening in both:
        await listening.reaches("SUBSCRIBED")
    await both_arrive(*both)


async def misses_nothing_while_the_relay_is_away_when_it_named_its_session():
    client = await connect(RELAY, await token("anon"), await token("alice"), {"session": str(uuid4())})
    notes = await subscribed(client, "notes", NOTES)
    await write(f"insert into notes (id, owner, title) values (1, '{ALICE}', 'a')")
    came = {}

    async def until(last):
        while True:
            name, data = await notes.changes.next()
            came[data["record"]["id"], data["commit_timestamp"]] = brief(name, data)
            if data["record"]["id"] == last:
                return

    await until(1)
    await order("STOP")
    await notes.reaches("CHANNEL_ERROR")
    await write(f"insert into notes (id, owner, title) values (2, '{ALICE}', 'b'), (3, '{BOB}', 'c'), (4, '{ALICE}', 'd')")
    await order("START")
    await notes.reaches("SUBSCRIBED")
    await write(f"insert into notes (id, owner, title) values (5, '{ALICE}', 'e')")
    await until(5)
    # What it may have got twice is one change by its time and key.
    same(list(came.values()), [f"INSERT {n}" for n in (1, 2, 4, 5)])


async def has_channels_that_come_and_go_on_their_own():
    client = await connect(RELAY, await token("anon"), await token("alice"))
    everything = await subscribed(client, "all", BOARD)
    seven = await subscribed(client, "seven", {**BOARD, "filter": "list=eq.7"})
    notes = await subscribed(client, "notes", NOTES)
    await write("insert into board values (1, 7, 'a'), (2, 8, 'b')")
    await write(f"insert into notes (id, owner, title) values (3, '{ALICE}', 'a')")
    same(await everything.briefs(2), ["INSERT 1", "INSERT 2"])
    same((await seven.briefs(1), await notes.briefs(1)), (["INSERT 1"], ["INSERT 3"]))

    await everything.channel.unsubscribe()
    await everything.reaches("CLOSED")
    await write("insert into board values (4, 7, 'a')")
    same(await seven.briefs(1), ["INSERT 4"])

    again = await subscribed(client, "all", BOARD)
    await write("insert into board values (5, 8, 'b'), (6, 7, 'a')")
    same(await again.briefs(2), ["INSERT 5", "INSERT 6"])
    same(await seven.briefs(1), ["INSERT 6"])
    assert everything.changes.empty()
    for listening in (again, seven, notes):
        await listening.channel.unsubscribe()
        await listening.reaches("CLOSED")


async def is_told_why_a_subscription_fails():
    client = await connect(RELAY, await token("anon"))
    for binding, reason in [
        ({**BOARD, "filter": "nope=eq.1"}, "invalid column for filter nope"),
        ({**BOARD, "filter": "list=eq.many"}, "invalid input syntax for type integer"),
        ({**BOARD, "table": "unwatched"}, "Unable to subscribe to changes with given parameters"),
        ({**BOARD, "filter": "list"}, "Error parsing `filter` params"),
    ]:
        bad = await Listening(client, f"bad {reason}", binding).subscribe()
        error = await bad.reaches("CHANNEL_ERROR")
        assert reason in error, error
        await client.remove_channel(bad.channel)
    board = await subscribed(client, "board", BOARD)
    await write("insert into board values (1, 7, 'a')")
    same(await board.briefs(1), ["INSERT 1"])


async def stays_subscribed_when_it_is_told_that_no_policy_shows_it_a_row():
    client = await connect(RELAY, await token("anon"), await token("alice"))
    closed = await subscribed(client, "closed", {"event": "*", "schema": "public", "table": "closed"})
    message = await closed.systems.next()
    same((message.status, message.extension), ("ok", "postgres_changes"))
    begin = "public.closed: no row-level policy lets authenticated read a row: create policy "
    assert message.message.startswith(begin), message.message
    await write("create policy everyone on closed for select to authenticated using (true); insert into closed values (1)")
    same(await closed.briefs(1), ["INSERT 1"])
    same(closed.statuses.qsize(), 0)


async def is_refused_with_an_expired_token_and_let_in_with_a_new_one():
    client = await connect(RELAY, await token("anon"), await token("alice", -10))
    notes = await Listening(client, "notes", NOTES).subscribe()
    error = await notes.reaches("CHANNEL_ERROR")
    assert re.search(r"InvalidJWTToken: Token has expired \d+ seconds ago", error), error
    await client.set_auth(await token("alice"))
    await notes.reaches("SUBSCRIBED")
    await write(f"insert into notes (id, owner, title) values (1, '{ALICE}', 'a')")
    same(await notes.briefs(1), ["INSERT 1"])


async def is_closed_when_its_token_ends():
    client = await connect(RELAY, await token("anon"), await token("alice", 4))
    notes = await subscribed(client, "notes", NOTES)
    error = await notes.reaches("CHANNEL_ERROR")
    assert re.search(r"Token has expired \d+ seconds ago", error), error
    await notes.reaches("CLOSED")
    await client.set_auth(await token("alice"))
    again = await subscribed(client, "notes", NOTES)
    await write(f"insert into notes (id, owner, title) values (1, '{ALICE}', 'a')")
    same(await again.briefs(1), ["INSERT 1"])


class Room:
    """A channel without changes: broadcasts, and presence if it has a key."""

    def __init__(self, client, topic, key, broadcast, private=False):
        presence = {"key": key or "", "enabled": key is not None}
        config = {"broadcast": {"ack": False, "self": False, **broadcast}, "presence": presence, "private": private}
        self.channel = client.channel(topic, {"config": config})
        self.messages, self.statuses, self.states = Inbox(), Inbox(), Inbox()
        self.channel.on_broadcast("*", self.messages.put_nowait)
        if key:
            self.channel.on_presence_sync(lambda: self.states.put_nowait(self.present()))

    async def enter(self):
        await self.channel.subscribe(lambda status, error: self.statuses.put_nowait((status.value, str(error))))
        same(await self.statuses.next(), ("SUBSCRIBED", "None"))
        return self

    def present(self):
        """What each key has tracked, as one text: `ann 1,2 ben 3`."""
        keys = sorted(self.channel.presence_state().items())
        return " ".join(f"{key} {','.join(sorted(str(meta['n']) for meta in metas))}" for key, metas in keys)

    async def until(self, wanted):
        while await self.states.next() != wanted:
            pass

    async def next(self):
        message = await self.messages.next()
        return message["event"], message["payload"]

    async def answered(self, event, payload):
        answers = Inbox()
        push = await self.channel.push("broadcast", {"type": "broadcast", "event": event, "payload": payload})
        push.receive("ok", lambda _: answers.put_nowait("ok"))
        push.receive("error", lambda response: answers.put_nowait(response))
        return await answers.next()


async def enter(url, topic, key=None, **broadcast):
    return await Room(await connect(url, await token("anon")), topic, key, broadcast).enter()


async def sends_broadcasts_to_others_and_to_itself_and_is_told_that_they_were_sent():
    ann = await enter(RELAY, "room", **{"self": True, "ack": True})
    ben = await enter(RELAY, "room")
    payload = {"n": 1.5, "text": "é", "list": [None, {"a": True}]}
    same(await ann.answered("one", payload), "ok")
    same(await ann.next(), ("one", payload))
    same(await ben.next(), ("one", payload))
    await ben.channel.send_broadcast("two", {})
    same(await ann.next(), ("two", {}))
    await ann.channel.send_broadcast("three", {})
    same(await ben.next(), ("three", {}))


async def hears_broadcasts_from_sql_with_their_ids():
    ben = await enter(RELAY, "room")
    await write("select realtime.send('{\"n\": 1.5, \"id\": \"mine\"}', 'one', 'room', false)")
    one = await ben.messages.next()
    same((one["event"], one["payload"]), ("one", {"n": 1.5, "id": "mine"}))
    same(len(one["meta"]["id"]), 36)
    await write("select realtime.send('{}', 'of private channels', 'room')")
    await write("select realtime.send_binary('\\x00ff', 'bytes', 'room', false)")
    await write("select realtime.send('{}', 'two', 'room', false)")
    two = await ben.messages.next()
    same((two["event"], two["payload"]), ("two", {"id": two["meta"]["id"]}))


async def uses_the_private_channels_that_the_policies_give_it():
    await write(
        """create policy own on realtime.messages for all to authenticated
        using (realtime.topic() = 'room:' || auth.uid()::text)"""
    )
    topic = f"room:{ALICE}"

    async def room(who, key, **broadcast):
        return Room(await connect(RELAY, await token("anon"), await token(who)), topic, key, broadcast, private=True)

    one = await (await room("alice", "one", **{"self": True, "ack": True})).enter()
    two = await (await room("alice", "two")).enter()
    same(await one.answered("one", {"n": 1}), "ok")
    for member in [one, two]:
        same(await member.next(), ("one", {"n": 1}))
    await one.channel.track({"n": 1})
    await two.channel.track({"n": 2})
    await two.until("one 1 two 2")
    await write(f"select realtime.send('{{\"n\": 2}}', 'two', '{topic}')")
    for member in [one, two]:
        same((await member.messages.next())["payload"]["n"], 2)
    bob = await room("bob", None)
    await bob.channel.subscribe(lambda status, error: bob.statuses.put_nowait((status.value, str(error))))
    status, error = await bob.statuses.next()
    same(status, "CHANNEL_ERROR")
    assert "You do not have permissions to read from this Channel topic" in error, error


async def sends_a_hundred_without_waiting_in_order():
    ann, ben = await enter(RELAY, "room"), await enter(RELAY, "room")
    for n in range(100):
        await ann.channel.send_broadcast("n", {"n": n})
    same([(await ben.next())[1]["n"] for _ in range(100)], list(range(100)))


async def is_told_that_a_broadcast_is_too_large_and_goes_on():
    ann = await enter(RELAY, "room", ack=True)
    ben = await enter(RELAY, "room")
    same(await ann.answered("large", {"text": "x" * 3_100_000}), {"error": "payload_size_exceeded"})
    same(await ann.answered("small", {}), "ok")
    same(await ben.next(), ("small", {}))
    # One whose frame is too large for this client is told, and both go on.
    same(await ann.answered("medium", {"text": "x" * 1_100_000}), "ok")
    same(await ann.answered("small", {"n": 2}), "ok")
    same(await ben.next(), ("small", {"n": 2}))
    same(ben.channel.is_joined, True)


async def sends_by_http_without_joining():
    ben = await enter(RELAY, "room")
    channel = (await connect(RELAY, await token("anon"))).channel("room")
    await channel.http_send("single", {"n": 2})
    same(await ben.next(), ("single", {"n": 2}))
    forged = (await token("alice")).rpartition(".")[0] + "." + "A" * 43
    try:
        await AsyncRealtimeClient(f"{RELAY}/realtime/v1", forged).channel("room").http_send("single", {})
    except Exception as refusal:
        assert "Failed to validate JWT signature" in str(refusal), refusal
    else:
        raise AssertionError("it was sent")


async def gets_bytes_where_its_version_has_them():
    ann, ben = await enter(RELAY, "room"), await enter(RELAY, "room")
    await ann.channel.http_send("bytes", b"\x00\xff\x07")
    await ann.channel.http_send("json", {"n": 1})
    same(await ben.next(), ("json", {"n": 1}))


async def knows_who_is_present_from_which_tabs():
    first = await enter(RELAY, "room", "ann")
    await first.channel.track({"n": 1})
    await first.until("ann 1")
    second, ben = await enter(RELAY, "room", "ann"), await enter(RELAY, "room", "ben")
    await second.channel.track({"n": 2})
    await ben.channel.track({"n": 3})
    for member in [first, second, ben]:
        await member.until("ann 1,2 ben 3")
    await ben.channel.track({"n": 4})
    same(await first.states.next(), "ann 1,2 ben 4")
    await second.channel.untrack()
    same(await first.states.next(), "ann 1 ben 4")
    await second.channel.track({"n": 5})
    same(await first.states.next(), "ann 1,5 ben 4")
    await second.channel.unsubscribe()
    same(await first.states.next(), "ann 1 ben 4")


async def is_gone_when_its_socket_was_cut_and_is_present_when_it_tracks_again():
    ann, ben = await enter(PROXY, "room", "ann"), await enter(RELAY, "room", "ben")
    await ann.channel.track({"n": 1})
    await ben.channel.track({"n": 2})
    await ben.until("ann 1 ben 2")
    await order("CUT")
    await ben.until("ben 2")
    while (await ann.statuses.next())[0] != "SUBSCRIBED":
        pass
    await ann.channel.track({"n": 3})
    await ben.until("ann 3 ben 2")
    await ann.until("ann 3 ben 2")


async def is_not_connected_with_a_wrong_signature():
    forged = (await token("alice")).rpartition(".")[0] + "." + "A" * 43
    client = AsyncRealtimeClient(f"{RELAY}/realtime/v1", forged, max_retries=1)
    try:
        await client.connect()
    except Exception as refusal:
        assert "401" in str(refusal), refusal
    else:
        raise AssertionError("it was let in")


asyncio.run(globals()[sys.argv[1]]())
