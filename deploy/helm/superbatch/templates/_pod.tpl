{{/* The pod template of a role. (list root role) */}}
{{- define "superbatch.pod" -}}
{{- $root := first . -}}
{{- $role := last . -}}
{{- $v := $root.Values -}}
{{- $r := get $v $role -}}
{{- $isWorker := eq $role "worker" -}}
{{- $image := ternary $v.worker.image $v.coordinator.image (or $isWorker $v.coordinator.embeddedWorker) -}}
{{- $holdsState := $v.state.persistence.enabled -}}
{{- $keepsAudit := and (not $isWorker) $v.coordinator.audit.enabled $v.coordinator.audit.volume -}}
{{- $keepsBlocks := and $v.worker.diskCache.enabled (or $isWorker $v.coordinator.embeddedWorker) -}}
metadata:
  labels:
    {{- include "superbatch.selector" (list $root $role) | nindent 4 }}
    app.kubernetes.io/part-of: superbatch
    {{- with $v.commonLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- with $r.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/config: {{ include "superbatch.config" (list $root $role) | sha256sum }}
    {{- with $r.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "superbatch.serviceAccount" (list $root $role) }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "superbatch.gracePeriod" (list $root $role) }}
  securityContext:
    {{- toYaml $v.podSecurityContext | nindent 4 }}
  {{- with $v.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $r.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $r.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $r.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $r.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $r.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $r.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml $r.topologySpreadConstraints | nindent 4 }}
  {{- else if $isWorker }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "superbatch.selector" (list $root $role) | nindent 10 }}
  {{- end }}
  containers:
    - name: {{ $role }}
      image: {{ include "superbatch.image" (list $root $image) }}
      imagePullPolicy: {{ $v.imagePullPolicy }}
      args: [{{ ternary "worker" "serve" $isWorker }}, --config, /etc/superbatch/config/{{ $role }}.yaml]
      securityContext:
        {{- toYaml $v.securityContext | nindent 8 }}
      ports:
        - name: grpc
          containerPort: {{ ternary 50052 50051 $isWorker }}
          protocol: TCP
        - name: health
          containerPort: 50053
          protocol: TCP
        {{- if $v.metrics.enabled }}
        - name: metrics
          containerPort: 9464
          protocol: TCP
        {{- end }}
      {{- with include "superbatch.env" . | fromYamlArray }}
      env:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- if or $v.storage.credentialsSecret $r.extraEnvFrom }}
      envFrom:
        {{- with $v.storage.credentialsSecret }}
        - secretRef: {name: {{ . }}}
        {{- end }}
        {{- with $r.extraEnvFrom }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- end }}
      {{- $gpus := ternary $v.worker.gpu.count 0 (or $isWorker $v.coordinator.embeddedWorker) }}
      resources:
        {{- if $gpus }}
        {{- toYaml (mergeOverwrite (deepCopy $r.resources) (dict "limits" (dict $v.worker.gpu.resourceName $gpus))) | nindent 8 }}
        {{- else }}
        {{- toYaml $r.resources | nindent 8 }}
        {{- end }}
      # Whether the process answers at all, never whether object storage does: another start would not mend that.
      startupProbe:
        grpc: {port: 50053, service: liveness}
        periodSeconds: {{ $r.startupProbe.periodSeconds }}
        failureThreshold: {{ $r.startupProbe.failureThreshold }}
        timeoutSeconds: 5
      readinessProbe:
        grpc: {port: 50053, service: readiness}
        periodSeconds: {{ $r.readinessProbe.periodSeconds }}
        failureThreshold: {{ $r.readinessProbe.failureThreshold }}
        timeoutSeconds: 5
      livenessProbe:
        grpc: {port: 50053, service: liveness}
        periodSeconds: {{ $r.livenessProbe.periodSeconds }}
        failureThreshold: {{ $r.livenessProbe.failureThreshold }}
        timeoutSeconds: 5
      lifecycle:
        preStop:
          sleep: {seconds: {{ $v.preStopSeconds }}}
      volumeMounts:
        - {name: config, mountPath: /etc/superbatch/config, readOnly: true}
        - {name: tmp, mountPath: /tmp}
        {{- if $v.tls.enabled }}
        - {name: tls, mountPath: /etc/superbatch/tls, readOnly: true}
        {{- end }}
        {{- if $v.auth.enabled }}
        - {name: tokens, mountPath: /etc/superbatch/tokens, readOnly: true}
        {{- end }}
        {{- if $holdsState }}
        - {name: state, mountPath: /var/lib/superbatch}
        {{- end }}
        {{- if $keepsAudit }}
        - {name: audit, mountPath: /var/log/superbatch}
        {{- end }}
        {{- if and $v.worker.shmSize (or $isWorker $v.coordinator.embeddedWorker) }}
        - {name: shm, mountPath: /dev/shm}
        {{- end }}
        {{- if $keepsBlocks }}
        - {name: disk-cache, mountPath: /var/cache/superbatch}
        {{- end }}
        {{- with $r.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ include "superbatch.fullname" $root }}
        items: [{key: {{ $role }}.yaml, path: {{ $role }}.yaml}]
    - name: tmp
      emptyDir: {sizeLimit: {{ $r.tmpSizeLimit }}}
    {{- if $v.tls.enabled }}
    - name: tls
      secret:
        secretName: {{ include "superbatch.tlsSecret" $root }}
        defaultMode: 0440
    {{- end }}
    {{- if $v.auth.enabled }}
    - name: tokens
      secret:
        secretName: {{ include "superbatch.tokensSecret" $root }}
        defaultMode: 0440
        # Each role sees its own and no other's.
        items: [{{ include "superbatch.tokenItems" $role }}]
    {{- end }}
    {{- if $holdsState }}
    - name: state
      persistentVolumeClaim: {claimName: {{ include "superbatch.claim" $root }}}
    {{- end }}
    {{- if $keepsAudit }}
    - name: audit
      {{- toYaml $v.coordinator.audit.volume | nindent 6 }}
    {{- end }}
    {{- if and $v.worker.shmSize (or $isWorker $v.coordinator.embeddedWorker) }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $v.worker.shmSize }}}
    {{- end }}
    {{- if $keepsBlocks }}
    - name: disk-cache
      {{- if $v.worker.diskCache.volume }}
      {{- toYaml $v.worker.diskCache.volume | nindent 6 }}
      {{- else }}
      # A pod that exceeds the limit is evicted: the lock file and folders take a little beside the blocks.
      emptyDir: {sizeLimit: {{ add (int64 $v.worker.diskCache.bytes) 268435456 | quote }}}
      {{- end }}
    {{- end }}
    {{- with $r.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{- define "superbatch.tokenItems" -}}
{{- if eq . "worker" }}{key: worker, path: worker}{{ else }}{key: tokens, path: tokens}{{ end -}}
{{- end -}}

{{/* Environment variables, those of extraEnv last. (list root role) */}}
{{- define "superbatch.env" -}}
{{- $root := first . -}}
{{- if eq (last .) "worker" }}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: SUPERBATCH_WORKER_ROLE__ADVERTISE_ADDRESS
  value: {{ include "superbatch.scheme" $root }}://$(POD_IP):50052
{{- end }}
{{- with (get $root.Values (last .)).extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}
