// node serve.mjs FOLDER PORT: serves the page, for this machine only, and runs the statements of statements.json with psql.
// DATABASE_URL names the database, PSQL the program.
import { spawn } from 'node:child_process';
import { createReadStream, readFileSync } from 'node:fs';
import { stat } from 'node:fs/promises';
import { createServer } from 'node:http';
import { extname, join, normalize } from 'node:path';

const [folder, port] = process.argv.slice(2);
const types = {
  '.html': 'text/html; charset=utf-8',
  '.js': 'text/javascript; charset=utf-8',
  '.css': 'text/css; charset=utf-8',
  '.json': 'application/json',
};
const json = (name) => JSON.parse(readFileSync(join(folder, name), 'utf8'));
const { people } = json('config.json');
const statements = new Map(json('statements.json').flatMap((system) => system.statements).map((one) => [one.id, one]));

// What psql is to read. Its own variables put values into statements, so that it quotes them.
function script({ as, sql }) {
  if (!as) return `${sql};`;
  return `begin; select set_config('request.jwt.claims', :'claims', true) \\g /dev/null
set local role authenticated;
${sql};
commit;`;
}

function run(statement, text) {
  const person = people.find(({ name }) => name === statement.as);
  const claims = person ? Buffer.from(person.token.split('.')[1], 'base64url').toString() : '';
  const variables = ['ON_ERROR_STOP=1', `claims=${claims}`, `text=${text}`].flatMap((one) => ['-v', one]);
  return new Promise((resolve) => {
    const psql = spawn(process.env.PSQL ?? 'psql', ['-qXAt', ...variables, process.env.DATABASE_URL]);
    const said = { stdout: '', stderr: '' };
    for (const name of ['stdout', 'stderr']) psql[name].on('data', (data) => { said[name] += data; });
    psql.on('error', (error) => resolve({ error: String(error) }));
    psql.on('close', (code) => {
      const error = /ERROR: +(.*)/.exec(said.stderr)?.[1] ?? said.stderr.trim();
      resolve(code === 0 ? { said: said.stdout.trim() } : { error });
    });
    psql.stdin.end(script(statement));
  });
}

async function answer(request) {
  // Another site's page cannot send this type without asking first, and is not answered when it asks.
  if (request.headers['content-type'] !== 'application/json') return { error: 'not JSON' };
  let body = '';
  for await (const part of request) {
    body += part;
    if (body.length > 10_000) return { error: 'too long' };
  }
  const { id, as = '', text = '' } = JSON.parse(body);
  const say = people.some(({ name }) => name === as) && { as, sql: `select send_chat_message(1, :'text')` };
  const statement = id === 'say' ? say : statements.get(id);
  return statement ? run(statement, String(text)) : { error: 'there is no such statement' };
}

createServer(async (request, response) => {
  try {
    const path = normalize(decodeURIComponent(new URL(request.url, 'http://localhost').pathname));
    if (request.method === 'POST' && path === '/run') {
      const found = JSON.stringify(await answer(request));
      response.writeHead(200, { 'content-type': types['.json'], 'cache-control': 'no-store' }).end(found);
      return;
    }
    // Rooted before it is joined, so that no ".." leads out of the folder.
    const file = join(folder, path.endsWith('/') ? `${path}index.html` : path);
    if (!(await stat(file)).isFile()) throw new Error('not a file');
    response.writeHead(200, { 'content-type': types[extname(file)] ?? 'application/octet-stream', 'cache-control': 'no-store' });
    createReadStream(file).pipe(response);
  } catch {
    response.writeHead(404, { 'content-type': 'text/plain' }).end('not found\n');
  }
}).listen(Number(port), '127.0.0.1');
