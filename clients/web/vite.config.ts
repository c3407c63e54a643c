import { readdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { brotliCompressSync, constants, gzipSync } from 'node:zlib'
import { svelte } from '@sveltejs/vite-plugin-svelte'
import { defineConfig, type Plugin } from 'vitest/config'

const OUT = '../../server/onebase_server/web'
/** Where `npm run dev` sends requests. The page's own Host stays, or the server would take it for another site's. */
const SERVER = { target: process.env.ONEBASE_URL ?? 'http://127.0.0.1:8000', changeOrigin: false }
const ROUTES = ['/v1', '/generate', '/ready', '/status', '/version']

/** Next to each script, style and picture the same in gzip and brotli: the server only hands them out. */
function compressed(): Plugin {
  return {
    name: 'compressed',
    apply: 'build',
    async closeBundle() {
      const folder = join(import.meta.dirname, OUT, 'assets')
      for (const name of await readdir(folder)) {
        const content = await readFile(join(folder, name))
        await writeFile(join(folder, `${name}.gz`), gzipSync(content, { level: 9 }))
        const params = { [constants.BROTLI_PARAM_QUALITY]: 11 }
        await writeFile(join(folder, `${name}.br`), brotliCompressSync(content, { params }))
      }
    },
  }
}

export default defineConfig({
  plugins: [svelte(), compressed()],
  build: {
    outDir: OUT,
    emptyOutDir: true,
    assetsInlineLimit: 0,
    target: 'es2023',
    modulePreload: { polyfill: false },
    reportCompressedSize: false,
    // Where the time of a build went is no warning, and reads like one on a slow machine.
    rolldownOptions: { checks: { pluginTimings: false } },
  },
  // The page is /console, behind a proxy perhaps /any/console: all addresses are relative.
  base: './',
  experimental: {
    renderBuiltUrl: (file, { hostType }) => (hostType === 'html' ? `console/${file}` : { relative: true }),
  },
  server: { proxy: Object.fromEntries(ROUTES.map((path) => [path, SERVER])) },
  test: { include: ['src/**/*.test.ts'], environment: 'node' },
})
