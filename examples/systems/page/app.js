// Each person has a client, which follows all tables, and a store of the rows that it is told of. A screen shows one person's store.
// Policies decide what comes: the code below is the same for all.

const config = await (await fetch('config.json')).json();
const systems = await (await fetch('statements.json')).json();
const names = Object.fromEntries(config.people.map(({ id, name }) => [id, name]));

function element(tag, className = '', text = '') {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}

// The key of each table, and which rows are read first.
const TABLES = {
  agent_access: { key: (row) => `${row.user_id} ${row.agent}` },
  conversation_members: { key: (row) => `${row.conversationId} ${row.userId}`, rereads: ['user_status', 'conversation_participants'] },
  conversation_participants: { key: (row) => `${row.conversationId} ${row.userId}`, rereads: ['user_status'] },
  user_status: { key: (row) => row.userId },
  user_online_periods: { key: (row) => row.id, read: '&order=id.desc&limit=50' },
  admin_metrics_view: { key: (row) => row.id },
  admin_metrics_by_day: { key: (row) => row.day },
  system_alerts: { key: (row) => row.id, read: '&order=id.desc&limit=200' },
  system_logs: { key: (row) => row.id, read: '&order=id.desc&limit=200' },
  chat_participants: { key: (row) => `${row.chat_session_id} ${row.user_id}`, rereads: ['chat_sessions', 'chat_messages'] },
  chat_sessions: { key: (row) => row.id },
  chat_messages: { key: (row) => row.id, read: '&order=id.desc&limit=100' },
};
// A page that stays open for days keeps as many rows of a feed as it reads at first.
const MOST_ROWS = 200;

// Milliseconds since 1970, with what is below a millisecond, which Date.parse drops.
const moment = (text) => Date.parse(text) + Number(`0.${/\.\d{3}(\d+)/.exec(text)?.[1] ?? 0}`);
const now = () => performance.timeOrigin + performance.now();

// The rows that one person sees.
class Store {
  constructor(person) {
    this.person = person;
    this.state = 'connecting';
    this.why = '';
    this.listeners = new Set();
    this.tables = Object.fromEntries(Object.keys(TABLES).map((name) => [name, { rows: new Map(), changed: new Set() }]));
  }

  rows(table) {
    return [...this.tables[table].rows.values()];
  }

  tell(event) {
    this.listeners.forEach((listener) => listener(event));
  }

  change(table, { eventType, new: after, old: before, commit_timestamp: committed }) {
    const { rows, changed } = this.tables[table];
    const { key, rereads = [] } = TABLES[table];
    const id = key(eventType === 'DELETE' ? before : after);
    changed.add(id);
    if (eventType === 'DELETE') rows.delete(id);
    else rows.set(id, { ...after, heardAt: performance.now() });
    if (rows.size > MOST_ROWS) rows.delete([...rows.keys()].sort((one, other) => one - other)[0]);
    this.tell({ table, eventType, after, before, at: now(), committed: moment(committed) });
    // Memberships decide about other tables, whose rows have not changed.
    rereads.forEach((other) => this.read(other));
  }

  async read(table) {
    const { rows, changed } = this.tables[table];
    changed.clear();
    const headers = { Authorization: `Bearer ${this.person.token}` };
    const answer = await fetch(`${config.url}/realtime/v1/changes?table=${table}${TABLES[table].read ?? ''}`, { headers });
    if (!answer.ok) return this.set('incomplete', await answer.text());
    const { key } = TABLES[table];
    const read = new Map((await answer.json()).rows.map((row) => [key(row), row]));
    // What was told while the rows were read is newer than they are.
    for (const id of rows.keys()) if (!read.has(id) && !changed.has(id)) rows.delete(id);
    for (const [id, row] of read) if (!changed.has(id)) rows.set(id, { ...row, heardAt: rows.get(id)?.heardAt });
    this.tell({});
  }

  set(state, why = '') {
    [this.state, this.why] = [state, why];
    this.tell({});
  }

  async open() {
    const client = supabase.createClient(config.url, config.key, {
      accessToken: async () => this.person.token,
      // Clients of one page share what they store, unless it has names of their own.
      auth: { storageKey: this.person.name, persistSession: false },
    });
    const channel = client.channel('screen');
    for (const table of Object.keys(TABLES)) {
      channel.on('postgres_changes', { event: '*', schema: 'public', table }, (change) => this.change(table, change));
    }
    channel.on('system', {}, ({ status, message }) => {
      if (message.startsWith('Stalled:')) return this.set('stalled', message);
      if (status === 'error' && !message.startsWith('Gap:')) return this.set('refused', message);
      this.set('live', message);
      if (message !== 'Feed resumed') Object.keys(TABLES).forEach((table) => this.read(table));
    });
    await client.realtime.setAuth();
    channel.subscribe((status, error) => this.set(status === 'SUBSCRIBED' ? 'joined' : 'reconnecting', error?.message));
  }
}

// A row that was told of a moment ago glows; what is left of the glow goes on when the list is drawn again.
function glowing(item, row) {
  const since = performance.now() - (row.heardAt ?? -Infinity);
  if (since < 1400) {
    item.classList.add('changed');
    item.style.animationDelay = `${-since}ms`;
  }
  return item;
}

function draw(body, title, className, items, none) {
  body.append(element('h3', '', title));
  if (!items.length) return body.append(element('p', 'none', none));
  const all = element('ul', className);
  all.append(...items);
  body.append(all);
  return all;
}

const byNumber = (column) => (one, other) => other[column] - one[column];
const byText = (of) => (one, other) => of(one).localeCompare(of(other));

function agents(store, body) {
  const mine = store.person.admin ? () => true : (row) => row.user_id === store.person.id;
  const label = (row) => (store.person.admin ? `${names[row.user_id]} · ${row.agent}` : row.agent);
  const items = store.rows('agent_access').filter(mine).sort(byText(label)).map((row) => {
    const item = element('li');
    if (store.person.admin) {
      item.dataset.state = row.enabled ? 'on' : 'off';
      item.append(element('span', 'name', label(row)), element('span', 'state', item.dataset.state));
    } else {
      item.append(element('span', 'name', label(row)), element('span', row.enabled ? 'switch on' : 'switch', row.enabled ? 'on' : 'off'));
    }
    return glowing(item, row);
  });
  draw(body, store.person.admin ? 'Everyone’s agents' : 'My agents', store.person.admin ? 'chips' : 'rows', items, 'No agents');
}

function people(store, body) {
  const items = store.rows('user_status').sort(byText((row) => row.username)).map((row) => {
    const item = element('li');
    const name = row.userId === store.person.id ? `${row.username} (you)` : row.username;
    item.dataset.state = row.isOnline ? 'online' : 'offline';
    item.append(element('span', 'dot'), element('span', 'name', name), element('time', '', item.dataset.state));
    return glowing(item, row);
  });
  draw(body, 'People in my conversations', 'rows', items, 'No conversations');
}

function history(store, body) {
  const seconds = (row) => (Date.parse(row.offlineAt ?? new Date()) - Date.parse(row.onlineAt)) / 1000;
  const time = (count) => (count < 100 ? `${Math.round(count)} s` : count < 6000 ? `${Math.round(count / 60)} min` : `${(count / 3600).toFixed(1)} h`);
  const items = store.rows('user_online_periods').sort(byNumber('id')).slice(0, store.person.admin ? 4 : 3).map((row) => {
    const item = element('li');
    const begin = new Date(row.onlineAt).toLocaleString([], { weekday: 'short', hour: '2-digit', minute: '2-digit' });
    const label = store.person.admin ? `${names[row.userId] ?? 'Guest'}, ${begin}` : begin;
    item.append(element('span', 'name', label), element('time', 'value', row.offlineAt ? time(seconds(row)) : 'online now'));
    return glowing(item, row);
  });
  draw(body, store.person.admin ? 'Who was online' : 'When I was online', 'rows', items, 'Not online yet');
}

function metrics(store, body) {
  const labels = { total_documents: 'documents', total_chunks: 'chunks', files_completed: 'completed', files_failed: 'failed' };
  const [row] = store.rows('admin_metrics_view');
  const tiles = row ? Object.entries(labels).map(([column, label]) => {
    const tile = element('li');
    tile.append(element('b', '', Number(row[column]).toLocaleString('en')), element('span', '', label));
    return glowing(tile, row);
  }) : [];
  draw(body, 'Metrics', 'tiles', tiles, 'Only for admins');
  if (!row) return;
  const days = store.rows('admin_metrics_by_day').sort(byText((day) => day.day));
  const most = Math.max(...days.map((day) => day.documents), 1);
  const bars = element('ul', 'bars');
  bars.append(...days.map((day) => {
    const bar = element('li');
    bar.style.height = `${(100 * day.documents) / most}%`;
    bar.title = `${day.day}: ${day.documents} documents`;
    return glowing(bar, day);
  }));
  body.append(bars);
}

function alerts(store, body) {
  const feed = [
    ...store.rows('system_alerts').map((row) => ({ ...row, kind: row.severity })),
    ...store.rows('system_logs').map((row) => ({ ...row, kind: 'log' })),
  ];
  const items = feed.sort((one, other) => Date.parse(other.created_at) - Date.parse(one.created_at)).slice(0, MOST_ROWS).map((row) => {
    const item = element('li', row.kind);
    item.append(element('span', 'severity', row.kind), element('span', 'message', row.message));
    return glowing(item, row);
  });
  draw(body, 'Alerts and logs', 'alerts', items, 'Only for admins');
}

function chat(store, body) {
  const [session] = store.rows('chat_sessions');
  const messages = store.rows('chat_messages').sort((one, other) => one.id - other.id);
  const items = messages.map((row) => {
    const item = element('li', row.sender_id === store.person.id ? 'own' : '');
    item.append(element('b', '', row.sender_name), element('span', '', row.message));
    return glowing(item, row);
  });
  const all = draw(body, session ? `Chat: ${session.title} (${session.status})` : 'Chat', 'messages', items, 'Not in a session');
  if (all) requestAnimationFrame(() => { all.scrollTop = all.scrollHeight; });
}

// Kept when the rest is drawn again: what is being written must stay.
function writing(screen) {
  const form = element('form', 'write');
  const input = element('input');
  input.placeholder = 'Write a message';
  input.setAttribute('aria-label', 'Message');
  form.append(input, element('button', '', 'Send'));
  form.onsubmit = async (event) => {
    event.preventDefault();
    if (!input.value.trim()) return;
    const { error } = await run({ id: 'say', as: screen.store.person.name, text: input.value });
    if (error) screen.toast(error);
    else input.value = '';
  };
  return form;
}

class Screen {
  constructor(stores, shown) {
    this.stores = stores;
    this.root = document.getElementById('panel').content.cloneNode(true).firstElementChild;
    this.body = this.root.querySelector('.body');
    this.form = writing(this);
    this.parts = element('div');
    this.body.append(this.parts, this.form);
    this.buttons = stores.map((store) => {
      const button = element('button', '', store.person.name);
      button.type = 'button';
      button.setAttribute('role', 'radio');
      button.onclick = () => this.show(store);
      return button;
    });
    this.root.querySelector('.people').append(...this.buttons);
    stores.forEach((store) => store.listeners.add((event) => {
      if (store !== this.store) return;
      if (event.table === 'agent_access' && event.after?.enabled === false && event.after.user_id === store.person.id) {
        this.toast(`The agent “${event.after.agent}” was switched off.`);
      }
      if (event.table === 'conversation_members' && event.eventType === 'DELETE') this.toast('You are no longer in that conversation.');
      if (event.table === 'chat_participants' && event.eventType === 'DELETE') this.toast('You are no longer in that chat.');
      this.redraw();
    }));
    document.getElementById('panels').append(this.root);
    this.show(shown);
  }

  show(store) {
    this.store = store;
    this.buttons.forEach((button, index) => button.setAttribute('aria-checked', this.stores[index] === store));
    this.root.querySelector('.role').textContent = store.person.role;
    this.root.querySelector('.toast').hidden = true;
    this.redraw();
  }

  toast(text) {
    const toast = this.root.querySelector('.toast');
    toast.textContent = toast.hidden ? text : `${toast.textContent}\n${text}`;
    toast.hidden = false;
    clearTimeout(this.fading);
    this.fading = setTimeout(() => { toast.hidden = true; }, 5000);
  }

  // Once a frame, however many changes came.
  redraw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = undefined;
      const { store } = this;
      const chip = this.root.querySelector('.chip');
      [chip.textContent, chip.dataset.state, chip.title] = [store.state, store.state, store.why];
      const parts = document.createDocumentFragment();
      const order = store.person.admin ? [metrics, alerts, agents, history, people, chat] : [agents, people, history, metrics, chat];
      order.forEach((part) => part(store, parts));
      const scrolled = this.parts.querySelector('.alerts')?.scrollTop ?? 0;
      this.parts.replaceChildren(parts);
      const feed = this.parts.querySelector('.alerts');
      if (feed) feed.scrollTop = scrolled;
      this.form.hidden = store.rows('chat_messages').length === 0;
    });
  }
}

async function run(statement) {
  const answer = await fetch('run', { method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(statement) });
  return answer.json();
}

// What is known of a statement that has run: whose client heard of a change that was committed meanwhile, and after which time.
class Reach {
  constructor(shown) {
    this.shown = shown;
    stores.forEach((store) => store.listeners.add(({ at, committed }) => {
      // The clocks of PostgreSQL and the page may differ by a little.
      if (!(committed > this.start - 5 && committed < (this.end ?? Infinity) + 5)) return;
      if (!this.late.has(store)) this.late.set(store, Math.max(0, at - committed));
      this.draw();
    }));
  }

  begin() {
    [this.start, this.end, this.error, this.late] = [now(), undefined, undefined, new Map()];
    this.shown.replaceChildren();
  }

  finish(error) {
    [this.end, this.error] = [now(), error];
    this.draw();
  }

  draw() {
    if (!this.end) return;
    const lines = stores.map((store) => {
      const late = this.late.get(store);
      const text = late === undefined ? `${store.person.name} –` : `${store.person.name} ✓ ${late.toFixed(1)} ms`;
      return element('span', late === undefined ? 'no' : 'yes', text);
    });
    if (this.error) lines.unshift(element('span', 'refused', `Refused: ${this.error}`));
    this.shown.replaceChildren(...lines);
  }
}

function statement({ id, as, label, sql }) {
  const card = element('div', 'statement');
  const button = element('button', '', label);
  button.dataset.id = id;
  const shown = element('div', 'reach');
  shown.setAttribute('role', 'status');
  const reach = new Reach(shown);
  button.onclick = async () => {
    button.disabled = true;
    reach.begin();
    const { error } = await run({ id }).catch((failure) => ({ error: String(failure) }));
    reach.finish(error);
    button.disabled = false;
  };
  card.append(button, element('span', 'by', as ? `as ${as}` : 'psql'), element('pre', '', sql), shown);
  return card;
}

const stores = config.people.map((person) => new Store(person));
for (const { system, file, statements } of systems) {
  const section = element('section');
  const title = element('h2', '', system);
  title.append(element('code', '', file));
  section.append(title, ...statements.map(statement));
  document.getElementById('statements').append(section);
}

const [ana, ben] = stores;
[ana, ben].forEach((store) => new Screen(stores, store));
stores.forEach((store) => store.open());
