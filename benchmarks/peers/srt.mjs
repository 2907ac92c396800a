// Anthropic's sandbox-runtime as a proxy alone: TLS terminated, one host allowed, a header set.
// node srt.mjs PACKAGE_DIR UNIX_SOCKET CA_FILE HOST
import { readFileSync } from 'node:fs';
const [dir, path, ca, host] = process.argv.slice(2);
const { createHttpProxyServer } = await import(`${dir}/dist/sandbox/http-proxy.js`);
const { createMitmCA } = await import(`${dir}/dist/sandbox/mitm-ca.js`);
const here = (name, options, done) =>
  options.all ? done(null, [{ address: '127.0.0.1', family: 4 }]) : done(null, '127.0.0.1', 4);
const server = createHttpProxyServer({
  filter: (_port, name) => name === host,
  filterRequest: async () => ({ action: 'allow' }),
  mitmCA: createMitmCA({}),
  mutateHeaders: (headers) => { headers['x-api-key'] = 'sk-bench'; return headers; },
  tlsTerminateUpstreamCA: readFileSync(ca),
  lookupFor: () => here,
});
server.listen(path);
