// The views that there are, in the order of the navigation. A view that a key's scopes do not allow is not shown.
import type { Component } from 'svelte'
import type { Scope } from '../api/client'
import Adapters from './Adapters.svelte'
import Batches from './Batches.svelte'
import Compare from './Compare.svelte'
import Server from './Server.svelte'
import Tenant from './Tenant.svelte'
import Training from './Training.svelte'

export interface View {
  id: string
  title: string
  /** Any of them is enough. */
  scopes: Scope[]
  component: Component
}

export const VIEWS: View[] = [
  { id: 'compare', title: 'Compare', scopes: ['generate'], component: Compare as Component },
  { id: 'adapters', title: 'Adapters', scopes: ['adapters'], component: Adapters as Component },
  { id: 'training', title: 'Training', scopes: ['train'], component: Training as Component },
  { id: 'batches', title: 'Batches', scopes: ['generate', 'train'], component: Batches as Component },
  { id: 'tenant', title: 'Tenant', scopes: ['generate', 'adapters', 'train', 'admin'], component: Tenant as Component },
  { id: 'server', title: 'Server', scopes: ['admin'], component: Server as Component },
]
